"""
Proves by force that nothing is lost: `python -m chaos`.

It starts a PostgreSQL of its own with the durability of production, two API servers with two workers each, and a
scripted HTTP agent; calls them from many connections; and meanwhile kills workers, stops them for longer than their
lease, and kills the database. Then it waits until recovery is done and compares three independent accounts of what
happened: what the callers were answered, what the agent received, what the tables say. Every difference that the
contract does not allow is named.

It stands beside `tests/` and not in it, because it is a program with processes of its own; a short run of it is one of
the tests. What is decided by the seed: the agents, what each client asks for, how the agent behaves, when what is
killed. How the processes interleave is not.

    plan      what is to happen, from a seed
    machines  the processes: PostgreSQL, API servers, Redis, the agent
    server    the app that the API servers run: the production one, with a lease that fits the run
    agent     the scripted agent, a program
    load      the callers
    events    the killing and stopping
    evidence  the three accounts, gathered
    checks    what must hold of them
    moments   the checks of what was admitted when
    controls  ledgers that break one guard each; the checks must catch every one
    run       all of it in order
"""
