-- The counts of a window (51 buckets, that of bucket b at b % 51 + 1) when time has gone on to another bucket.
CREATE FUNCTION external_agents_advanced(counts integer[], head bigint, new_head bigint) RETURNS integer[]
LANGUAGE plpgsql IMMUTABLE STRICT AS $$
BEGIN
    IF new_head - head >= 51 THEN
        RETURN array_fill(0, ARRAY[51]);
    END IF;
    FOR bucket IN head + 1 .. new_head LOOP
        counts[bucket % 51 + 1] := 0;
    END LOOP;
    RETURN counts;
END
$$;

-- Settles and admits a batch of invocations, in the transaction of the statement that calls it.
--
-- k_*: the budgets' accounts that the batch may touch, in the order of their keys.
-- s_*: invocations that have ended. s_released, s_charged: which account held their reservation, which pays; or null.
-- g_*: groups of admissions, in the order of their agents' keys; of each version of an agent one of each kind at most.
--      g_kind: 0 its limits are counted here, 1 a place was taken elsewhere, 2 a place was refused elsewhere.
--      g_account: of the agent's budget, or null.
-- a_*: invocations to be admitted, group by group. a_group: the index of the group. a_key: null without an idempotency
--      key; a_key and a_request_hash are empty when no admission has one.
--
-- settled: which of s_* were running, and are settled now.
-- has_lease: whether this process may admit; without it nothing is admitted and all that follows is null.
-- g_state: 0 some may have been admitted, else why none was: 1 not found, 2 stale version, 3 inactive.
-- g_admitted: how many of the group were admitted: the first ones that no earlier invocation answers for.
-- g_refusal: why the others were not: 6 rate limited, 7 over budget.
-- g_heads, g_counts: the windows after the batch, of the groups of kind 0 that have limits, one after the other.
-- i_item, i_state, i_invocation_id: admissions for which an earlier invocation answers: 4 its payload was another, 5 it
--      has not ended, 8 it has.
--
-- Locks are taken in one order everywhere: an instance, agents' windows by key, accounts by key, invocations. The clock
-- is read when they are held: windows never see time go back, and now() would be the transaction's start, before the
-- waiting.
--
-- Every statement finds its row by the whole primary key. Set-based ones were tried: whether they look up each row, or
-- read all that the batch's organisations ever had, depended on statistics.
CREATE FUNCTION external_agents_commit(
    routing_org_id text, lock_wait text,
    k_org_id text[], k_agent_id uuid[], k_currency text[], k_month date[],
    s_org_id text[], s_id uuid[], s_released integer[], s_charged integer[], s_status text[], s_response_payload text[],
    s_response_status integer[], s_attempts text[], s_execution_time_ms integer[], s_error_code text[],
    s_error_message text[], s_cost_amount text[], s_cost_overrun boolean[], s_completed_at timestamptz[],
    instance uuid,
    g_org_id text[], g_agent_id uuid[], g_version integer[], g_kind smallint[], g_wanted integer[], g_account integer[],
    a_group integer[], a_id uuid[], a_initiated_by text[], a_request_payload text[], a_trace_id text[],
    a_lineage_hop_id text[], a_created_at timestamptz[], a_key text[], a_request_hash bytea[],
    OUT settled boolean[], OUT has_lease boolean, OUT moment timestamptz, OUT g_state smallint[],
    OUT g_admitted integer[], OUT g_refusal smallint[], OUT g_heads bigint[], OUT g_counts integer[],
    OUT i_item integer[], OUT i_state smallint[], OUT i_invocation_id uuid[]
)
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
AS $$
#variable_conflict use_variable
DECLARE
    k_spent numeric[];
    k_reserved numeric[];
    g_amount numeric[];
    k record;
    account record;
    s record;
    g record;
    a record;
    filed record;
    agent record;
    earlier record;
    admits boolean := cardinality(g_agent_id) > 0;
    minute_now bigint;
    hour_now bigint;
    day_now bigint;
    wanted integer;
    admitted integer;
    refusal smallint;
    state smallint;
    used bigint;
    room bigint;
    affordable numeric;
BEGIN
    PERFORM set_config('lock_timeout', lock_wait, true);
    IF admits THEN
        moment := clock_timestamp();
        -- Recovery takes this process for dead only when it gets this row, after this transaction.
        PERFORM FROM instances WHERE id = instance AND lease_until > moment FOR KEY SHARE;
        has_lease := FOUND;
        admits := has_lease;
    END IF;
    IF admits THEN
        -- Changes of an agent take the same lock. What is read of the agent behind it, in a new statement, holds.
        FOR g IN SELECT * FROM unnest(g_org_id, g_agent_id) AS element (org_id, agent_id) LOOP
            PERFORM FROM external_agent_rate_windows AS held
            WHERE held.org_id = g.org_id AND held.agent_id = g.agent_id FOR UPDATE;
        END LOOP;
    END IF;
    FOR k IN
        SELECT * FROM unnest(k_org_id, k_agent_id, k_currency, k_month) AS element (org_id, agent_id, currency, month)
    LOOP
        LOOP
            SELECT held.spent, held.reserved INTO account
            FROM external_agent_budgets AS held
            WHERE held.org_id = k.org_id AND held.agent_id = k.agent_id AND held.currency = k.currency
                AND held.month = k.month
            FOR UPDATE;
            EXIT WHEN FOUND;
            INSERT INTO external_agent_budgets (org_id, agent_id, currency, month, spent, reserved)
            SELECT owner.org_id, owner.id, k.currency, k.month, 0, 0
            FROM external_agents AS owner WHERE owner.org_id = k.org_id AND owner.id = k.agent_id
            ON CONFLICT DO NOTHING;
            EXIT WHEN NOT EXISTS (
                SELECT FROM external_agents AS owner WHERE owner.org_id = k.org_id AND owner.id = k.agent_id
            );
        END LOOP;
        k_spent := k_spent || account.spent;
        k_reserved := k_reserved || account.reserved;
    END LOOP;

    FOR s IN
        SELECT *
        FROM unnest(s_org_id, s_id, s_released, s_charged, s_status, s_response_payload, s_response_status, s_attempts,
            s_execution_time_ms, s_error_code, s_error_message, s_cost_amount, s_cost_overrun, s_completed_at)
            AS element (org_id, id, released, charged, status, response_payload, response_status, attempts,
            execution_time_ms, error_code, error_message, cost_amount, cost_overrun, completed_at)
    LOOP
        WITH running AS (
            DELETE FROM external_agent_invocations AS this
            WHERE this.org_id = s.org_id AND this.id = s.id AND NOT this.ended AND this.status = 'running'
            RETURNING this.*
        )
        INSERT INTO external_agent_invocations AS this (org_id, id, external_agent_id, lineage_hop_id,
            parent_invocation_id, initiated_by, status, request_payload, response_payload, response_status, attempts,
            execution_time_ms, error_code, error_message, reservation_amount, reservation_currency, cost_amount,
            cost_currency, cost_overrun, trace_id, created_at, completed_at, instance_id, ended)
        SELECT running.org_id, running.id, running.external_agent_id, running.lineage_hop_id,
            running.parent_invocation_id, running.initiated_by, s.status, running.request_payload,
            s.response_payload::json, s.response_status, s.attempts::json, s.execution_time_ms, s.error_code,
            s.error_message, running.reservation_amount, running.reservation_currency, s.cost_amount::numeric,
            k_currency[s.charged], s.cost_overrun, running.trace_id, running.created_at, s.completed_at,
            running.instance_id, true
        FROM running
        RETURNING this.external_agent_id AS agent_id, this.reservation_amount AS reserved,
            this.reservation_currency AS currency, date_trunc('month', this.created_at AT TIME ZONE 'UTC')::date AS month
        INTO filed;
        settled := settled || FOUND;
        CONTINUE WHEN NOT FOUND;
        IF (filed.reserved IS NOT NULL AND (filed.agent_id, filed.currency, filed.month)
                IS DISTINCT FROM (k_agent_id[s.released], k_currency[s.released], k_month[s.released]))
            OR (s.charged IS NOT NULL AND (filed.agent_id, filed.month)
                IS DISTINCT FROM (k_agent_id[s.charged], k_month[s.charged]))
        THEN
            RAISE EXCEPTION 'invocation % is settled as another agent''s, month''s or currency''s than it is', s.id;
        END IF;
        IF filed.reserved IS NOT NULL THEN
            k_reserved[s.released] := k_reserved[s.released] - filed.reserved;
        END IF;
        IF s.charged IS NOT NULL THEN
            k_spent[s.charged] := k_spent[s.charged] + s.cost_amount::numeric;
        END IF;
    END LOOP;

    IF admits THEN
        moment := clock_timestamp();
        -- div() is exact; a quotient is rounded before floor() sees it.
        minute_now := div(extract(epoch FROM moment) * 50, 60);
        hour_now := div(extract(epoch FROM moment) * 50, 3600);
        day_now := div(extract(epoch FROM moment) * 50, 86400);

        FOR a IN
            SELECT * FROM unnest(a_group, a_key, a_request_hash) WITH ORDINALITY AS element (g, key, request_hash, n)
            WHERE element.key IS NOT NULL
        LOOP
            SELECT kept.request_hash, kept.invocation_id, first.completed_at INTO earlier
            FROM external_agent_idempotency_keys AS kept
            JOIN external_agent_invocations AS first ON first.org_id = kept.org_id AND first.id = kept.invocation_id
            WHERE kept.org_id = g_org_id[a.g] AND kept.agent_id = g_agent_id[a.g] AND kept.key = a.key
                AND kept.created_at > moment - interval '24 hours';
            IF FOUND THEN
                i_item := i_item || a.n::integer;
                i_state := i_state || CASE
                    WHEN earlier.request_hash <> a.request_hash THEN 4 WHEN earlier.completed_at IS NULL THEN 5 ELSE 8
                END::smallint;
                i_invocation_id := i_invocation_id || earlier.invocation_id;
            END IF;
        END LOOP;

        FOR g IN
            SELECT * FROM unnest(g_org_id, g_agent_id, g_version, g_kind, g_wanted, g_account) WITH ORDINALITY
                AS element (org_id, agent_id, version, kind, wanted, account, n)
        LOOP
            SELECT this.version, this.status,
                (this.rate_limit_config ->> 'requests_per_minute')::numeric AS minute_limit,
                (this.rate_limit_config ->> 'requests_per_hour')::numeric AS hour_limit,
                (this.rate_limit_config ->> 'requests_per_day')::numeric AS day_limit,
                (this.budget_config ->> 'max_cost_per_invocation')::numeric AS amount,
                (this.budget_config ->> 'max_monthly_cost')::numeric AS cap,
                held.minute_head, held.minute_counts, held.hour_head, held.hour_counts, held.day_head, held.day_counts
            INTO agent
            FROM external_agents AS this
            JOIN external_agent_rate_windows AS held ON held.org_id = this.org_id AND held.agent_id = this.id
            WHERE this.org_id = g.org_id AND this.id = g.agent_id;
            state := CASE
                WHEN agent.status IS NULL OR agent.status = 'deleted' THEN 1 WHEN agent.version <> g.version THEN 2
                WHEN agent.status <> 'active' THEN 3 ELSE 0
            END;
            admitted := 0;
            refusal := 0;
            IF state = 0 THEN
                wanted := g.wanted;
                IF i_item IS NOT NULL THEN
                    wanted := wanted - (SELECT count(*) FROM unnest(i_item) AS i (item) WHERE a_group[i.item] = g.n);
                END IF;
                room := CASE WHEN g.kind = 2 THEN 0 END;
                IF g.kind = 0 THEN
                    IF agent.minute_head < minute_now THEN
                        agent.minute_counts :=
                            external_agents_advanced(agent.minute_counts, agent.minute_head, minute_now);
                        agent.minute_head := minute_now;
                    END IF;
                    IF agent.hour_head < hour_now THEN
                        agent.hour_counts := external_agents_advanced(agent.hour_counts, agent.hour_head, hour_now);
                        agent.hour_head := hour_now;
                    END IF;
                    IF agent.day_head < day_now THEN
                        agent.day_counts := external_agents_advanced(agent.day_counts, agent.day_head, day_now);
                        agent.day_head := day_now;
                    END IF;
                    IF agent.minute_limit IS NOT NULL THEN
                        used := (SELECT sum(c) FROM unnest(agent.minute_counts) AS c);
                        room := agent.minute_limit - used;
                    END IF;
                    IF agent.hour_limit IS NOT NULL THEN
                        used := (SELECT sum(c) FROM unnest(agent.hour_counts) AS c);
                        room := least(room, agent.hour_limit - used);
                    END IF;
                    IF agent.day_limit IS NOT NULL THEN
                        used := (SELECT sum(c) FROM unnest(agent.day_counts) AS c);
                        room := least(room, agent.day_limit - used);
                    END IF;
                END IF;
                -- Reservations of one agent are equal, so that what can be afforded is a number.
                affordable := CASE
                    WHEN agent.cap IS NULL THEN NULL
                    WHEN agent.amount IS NULL
                        THEN CASE WHEN k_spent[g.account] + k_reserved[g.account] >= agent.cap THEN 0 END
                    WHEN agent.amount = 0
                        THEN CASE WHEN k_spent[g.account] + k_reserved[g.account] > agent.cap THEN 0 END
                    ELSE greatest(0, div(agent.cap - k_spent[g.account] - k_reserved[g.account], agent.amount))
                END;
                admitted := greatest(0, least(wanted, room, affordable));
                IF admitted < wanted THEN
                    refusal := CASE WHEN affordable IS NULL OR room <= affordable THEN 6 ELSE 7 END;
                END IF;
                IF admitted > 0 AND g.kind = 0 THEN
                    agent.minute_counts[agent.minute_head % 51 + 1] :=
                        agent.minute_counts[agent.minute_head % 51 + 1] + admitted;
                    agent.hour_counts[agent.hour_head % 51 + 1] :=
                        agent.hour_counts[agent.hour_head % 51 + 1] + admitted;
                    agent.day_counts[agent.day_head % 51 + 1] :=
                        agent.day_counts[agent.day_head % 51 + 1] + admitted;
                    UPDATE external_agent_rate_windows AS held
                    SET minute_head = agent.minute_head, minute_counts = agent.minute_counts,
                        hour_head = agent.hour_head, hour_counts = agent.hour_counts,
                        day_head = agent.day_head, day_counts = agent.day_counts
                    WHERE held.org_id = g.org_id AND held.agent_id = g.agent_id;
                END IF;
                IF admitted > 0 AND agent.amount IS NOT NULL THEN
                    k_reserved[g.account] := k_reserved[g.account] + admitted * agent.amount;
                END IF;
                IF g.kind = 0 AND coalesce(agent.minute_limit, agent.hour_limit, agent.day_limit) IS NOT NULL THEN
                    g_heads := g_heads || ARRAY[agent.minute_head, agent.hour_head, agent.day_head];
                    g_counts := g_counts || agent.minute_counts || agent.hour_counts || agent.day_counts;
                END IF;
            END IF;
            g_state := g_state || state;
            g_admitted := g_admitted || admitted;
            g_refusal := g_refusal || refusal;
            g_amount := g_amount || agent.amount;
        END LOOP;

        IF 0 < ANY (g_admitted) THEN
            INSERT INTO external_agent_invocations (org_id, id, external_agent_id, lineage_hop_id, initiated_by, status,
                request_payload, attempts, reservation_amount, reservation_currency, cost_overrun, trace_id, created_at,
                instance_id)
            SELECT g_org_id[item.g], item.id, g_agent_id[item.g], item.lineage_hop_id, item.initiated_by, 'running',
                item.request_payload::json, '[]', g_amount[item.g],
                CASE WHEN g_amount[item.g] IS NOT NULL THEN k_currency[g_account[item.g]] END, false, item.trace_id,
                item.created_at, instance
            FROM (
                SELECT element.*, row_number() OVER (PARTITION BY element.g ORDER BY element.n) AS place
                FROM unnest(a_group, a_id, a_initiated_by, a_request_payload, a_trace_id, a_lineage_hop_id,
                    a_created_at) WITH ORDINALITY
                    AS element (g, id, initiated_by, request_payload, trace_id, lineage_hop_id, created_at, n)
                WHERE i_item IS NULL OR element.n <> ALL (i_item)
            ) AS item
            WHERE item.place <= g_admitted[item.g];
            IF cardinality(a_key) > 0 THEN
                -- What is in the way has expired, or its invocation is gone.
                INSERT INTO external_agent_idempotency_keys AS kept (org_id, agent_id, key, request_hash, invocation_id,
                    created_at)
                SELECT g_org_id[item.g], g_agent_id[item.g], item.key, item.request_hash, item.id, moment
                FROM (
                    SELECT element.*, row_number() OVER (PARTITION BY element.g ORDER BY element.n) AS place
                    FROM unnest(a_group, a_id, a_key, a_request_hash) WITH ORDINALITY
                        AS element (g, id, key, request_hash, n)
                    WHERE i_item IS NULL OR element.n <> ALL (i_item)
                ) AS item
                WHERE item.place <= g_admitted[item.g] AND item.key IS NOT NULL
                ON CONFLICT ON CONSTRAINT pk_external_agent_idempotency_keys DO UPDATE
                SET request_hash = excluded.request_hash, invocation_id = excluded.invocation_id,
                    created_at = excluded.created_at;
            END IF;
        END IF;
    END IF;

    FOR k IN
        SELECT * FROM unnest(k_org_id, k_agent_id, k_currency, k_month, k_spent, k_reserved)
            AS element (org_id, agent_id, currency, month, spent, reserved)
    LOOP
        UPDATE external_agent_budgets AS held SET spent = k.spent, reserved = k.reserved
        WHERE held.org_id = k.org_id AND held.agent_id = k.agent_id AND held.currency = k.currency
            AND held.month = k.month AND (held.spent, held.reserved) IS DISTINCT FROM (k.spent, k.reserved);
    END LOOP;
END
$$;
