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
-- s_*: invocations that have ended, one element each.
-- g_*: groups of admissions of one agent, each agent version with one kind at most once. kind: 0 its limits are counted
--      here, 1 a place was taken elsewhere, 2 a place was refused elsewhere. Of 0 and 1 an agent version has one only:
--      each group is decided on the state before the batch.
-- a_*: invocations to be admitted; a_group is the index of its group, a_key is null where it has no idempotency key.
-- month: of the admissions, first day. orgs: every organisation that the batch touches.
--
-- settled: which of s_id were running, by their place there, from 1; of two that are the same invocation, one.
-- g_state: 0 some may have been admitted, else why none was: 1 not found, 2 stale version, 3 inactive.
-- g_admitted: how many of the group were admitted: the first ones that no earlier invocation answers for.
-- g_refusal: why the others were not: 6 rate limited, 7 over budget.
-- g_heads, g_counts: the windows after the batch, of the groups of kind 0 that have limits, one after the other.
-- i_item, i_state, i_invocation_id: admissions for which an earlier invocation answers: 4 its payload was another, 5 it
--      has not ended, 8 it has.
--
-- Locks are taken in one order everywhere: an instance, agents' windows by key, accounts by key. The clock is read when
-- they are held: windows never see time go back, and now() would be the transaction's start, before the waiting.
CREATE FUNCTION external_agents_commit(
    routing_org_id text, lock_wait text, orgs text[],
    s_org_id text[], s_id uuid[], s_agent_id uuid[], s_month date[], s_reservation_currency text[], s_status text[],
    s_response_payload text[], s_response_status integer[], s_attempts text[], s_execution_time_ms integer[],
    s_error_code text[], s_error_message text[], s_cost_amount text[], s_cost_currency text[], s_cost_overrun boolean[],
    s_completed_at timestamptz[],
    instance uuid, month date,
    g_org_id text[], g_agent_id uuid[], g_version integer[], g_kind smallint[], g_wanted integer[],
    a_group integer[], a_id uuid[], a_initiated_by text[], a_request_payload text[], a_trace_id text[],
    a_lineage_hop_id text[], a_created_at timestamptz[], a_key text[], a_request_hash bytea[],
    OUT settled bigint[], OUT has_lease boolean, OUT moment timestamptz, OUT g_state smallint[], OUT g_admitted integer[],
    OUT g_refusal smallint[], OUT g_heads bigint[], OUT g_counts integer[],
    OUT i_item bigint[], OUT i_state smallint[], OUT i_invocation_id uuid[]
)
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $$
#variable_conflict use_variable
DECLARE
    k_org_id text[];
    k_agent_id uuid[];
    k_currency text[];
    k_month date[];
    first_id uuid;
    last_id uuid;
    booked boolean;
    admits boolean := cardinality(g_agent_id) > 0;
    epoch numeric;
    minute_now bigint;
    hour_now bigint;
    day_now bigint;
    one record;
    wanted integer;
    admitted integer;
    refusal smallint;
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
        PERFORM FROM unnest(g_org_id, g_agent_id) AS g (org_id, agent_id)
        JOIN external_agent_rate_windows AS held ON held.org_id = g.org_id AND held.agent_id = g.agent_id
        WHERE held.org_id = ANY (orgs)
        ORDER BY held.org_id COLLATE "C", held.agent_id
        FOR UPDATE OF held;
    END IF;

    SELECT array_agg(account.org_id), array_agg(account.agent_id), array_agg(account.currency), array_agg(account.month)
    INTO k_org_id, k_agent_id, k_currency, k_month
    FROM (
        SELECT every.org_id, every.agent_id, every.currency, every.month
        FROM (
            SELECT agent.org_id, agent.id AS agent_id, coalesce(agent.budget_config ->> 'currency', 'USD') AS currency,
                month AS month
            FROM unnest(g_org_id, g_agent_id) AS g (org_id, agent_id)
            JOIN external_agents AS agent ON agent.org_id = g.org_id AND agent.id = g.agent_id
            WHERE admits AND agent.org_id = ANY (orgs) AND agent.budget_config IS NOT NULL
            UNION ALL
            SELECT s.org_id, s.agent_id, s.currency, s.month
            FROM unnest(s_org_id, s_agent_id, s_reservation_currency, s_month) AS s (org_id, agent_id, currency, month)
            WHERE s.currency IS NOT NULL
            UNION ALL
            SELECT s.org_id, s.agent_id, s.currency, s.month
            FROM unnest(s_org_id, s_agent_id, s_cost_currency, s_month) AS s (org_id, agent_id, currency, month)
            WHERE s.currency IS NOT NULL
        ) AS every
        GROUP BY every.org_id, every.agent_id, every.currency, every.month
        ORDER BY every.org_id COLLATE "C", every.agent_id, every.currency COLLATE "C", every.month
    ) AS account;
    IF k_org_id IS NOT NULL THEN
        -- Those that are missing first, in order, and then the locks, in order: two batches cannot wait for each other.
        INSERT INTO external_agent_budgets (org_id, agent_id, currency, month, spent, reserved)
        SELECT k.org_id, k.agent_id, k.currency, k.month, 0, 0
        FROM unnest(k_org_id, k_agent_id, k_currency, k_month) WITH ORDINALITY
            AS k (org_id, agent_id, currency, month, n)
        WHERE NOT EXISTS (
            SELECT FROM external_agent_budgets AS held
            WHERE held.org_id = ANY (orgs) AND held.org_id = k.org_id AND held.agent_id = k.agent_id
                AND held.currency = k.currency AND held.month = k.month
        ) AND EXISTS (
            SELECT FROM external_agents AS agent
            WHERE agent.org_id = ANY (orgs) AND agent.org_id = k.org_id AND agent.id = k.agent_id
        )
        ORDER BY k.n
        ON CONFLICT DO NOTHING;
        PERFORM FROM unnest(k_org_id, k_agent_id, k_currency, k_month) WITH ORDINALITY
            AS k (org_id, agent_id, currency, month, n)
        JOIN external_agent_budgets AS held ON held.org_id = k.org_id AND held.agent_id = k.agent_id
            AND held.currency = k.currency AND held.month = k.month
        WHERE held.org_id = ANY (orgs)
        ORDER BY k.n
        FOR UPDATE OF held;
    END IF;

    IF cardinality(s_id) > 0 THEN
        -- The range prunes partitions; a list of ids would not.
        SELECT min(s.id::text)::uuid, max(s.id::text)::uuid INTO first_id, last_id FROM unnest(s_id) AS s (id);
        WITH ended AS (
            UPDATE external_agent_invocations AS this
            SET status = s.status, response_payload = s.response_payload::json, response_status = s.response_status,
                attempts = s.attempts::json, execution_time_ms = s.execution_time_ms, error_code = s.error_code,
                error_message = s.error_message, cost_amount = s.cost_amount::numeric, cost_currency = s.cost_currency,
                cost_overrun = s.cost_overrun, completed_at = s.completed_at
            FROM unnest(s_org_id, s_id, s_status, s_response_payload, s_response_status, s_attempts,
                s_execution_time_ms, s_error_code, s_error_message, s_cost_amount, s_cost_currency, s_cost_overrun,
                s_completed_at) WITH ORDINALITY
                AS s (org_id, id, status, response_payload, response_status, attempts, execution_time_ms, error_code,
                error_message, cost_amount, cost_currency, cost_overrun, completed_at, n)
            WHERE this.org_id = ANY (orgs) AND this.id BETWEEN first_id AND last_id
                AND this.org_id = s.org_id AND this.id = s.id AND this.status = 'running'
            RETURNING s.n, this.org_id, this.external_agent_id AS agent_id,
                date_trunc('month', this.created_at AT TIME ZONE 'UTC')::date AS month, this.reservation_amount,
                this.reservation_currency, this.cost_amount, this.cost_currency
        ), change AS (
            SELECT every.org_id, every.agent_id, every.currency, every.month, sum(every.charged) AS charged,
                sum(every.released) AS released
            FROM (
                SELECT ended.org_id, ended.agent_id, ended.cost_currency AS currency, ended.month,
                    ended.cost_amount AS charged, 0 AS released
                FROM ended WHERE ended.cost_amount IS NOT NULL
                UNION ALL
                SELECT ended.org_id, ended.agent_id, ended.reservation_currency, ended.month, 0,
                    ended.reservation_amount
                FROM ended WHERE ended.reservation_amount IS NOT NULL
            ) AS every
            GROUP BY every.org_id, every.agent_id, every.currency, every.month
        ), booking AS (
            UPDATE external_agent_budgets AS account
            SET spent = account.spent + change.charged, reserved = account.reserved - change.released
            FROM change
            WHERE account.org_id = ANY (orgs) AND account.org_id = change.org_id
                AND account.agent_id = change.agent_id AND account.currency = change.currency
                AND account.month = change.month
            RETURNING 1
        )
        SELECT (SELECT array_agg(ended.n) FROM ended),
            (SELECT count(*) FROM booking) = (SELECT count(*) FROM change)
        INTO settled, booked;
        IF NOT booked THEN
            RAISE EXCEPTION 'an invocation was settled as another agent''s, month''s or currency''s than it is';
        END IF;
    END IF;

    IF NOT admits THEN
        RETURN;
    END IF;
    moment := clock_timestamp();
    epoch := extract(epoch FROM moment);
    -- div() is exact; a quotient is rounded before floor() sees it.
    minute_now := div(epoch * 50, 60);
    hour_now := div(epoch * 50, 3600);
    day_now := div(epoch * 50, 86400);

    IF cardinality(a_key) > 0 THEN
        SELECT array_agg(a.n), array_agg(
            CASE WHEN kept.request_hash <> a.request_hash THEN 4 WHEN earlier.completed_at IS NULL THEN 5 ELSE 8 END
        ), array_agg(kept.invocation_id)
        INTO i_item, i_state, i_invocation_id
        FROM unnest(a_group, a_key, a_request_hash) WITH ORDINALITY AS a (g, key, request_hash, n)
        JOIN external_agent_idempotency_keys AS kept
            ON kept.org_id = g_org_id[a.g] AND kept.agent_id = g_agent_id[a.g] AND kept.key = a.key
        JOIN external_agent_invocations AS earlier
            ON earlier.org_id = kept.org_id AND earlier.id = kept.invocation_id
        WHERE kept.org_id = ANY (orgs) AND earlier.org_id = ANY (orgs)
            AND kept.created_at > moment - interval '24 hours';
    END IF;

    FOR one IN
        SELECT g.n, g.org_id, g.agent_id, g.kind, g.wanted,
            CASE WHEN agent.status IS NULL OR agent.status = 'deleted' OR held.org_id IS NULL THEN 1 WHEN agent.version <> g.version THEN 2
                WHEN agent.status <> 'active' THEN 3 ELSE 0 END AS state,
            (agent.rate_limit_config ->> 'requests_per_minute')::numeric AS minute_limit,
            (agent.rate_limit_config ->> 'requests_per_hour')::numeric AS hour_limit,
            (agent.rate_limit_config ->> 'requests_per_day')::numeric AS day_limit,
            (agent.budget_config ->> 'max_cost_per_invocation')::numeric AS amount,
            (agent.budget_config ->> 'max_monthly_cost')::numeric AS cap,
            held.minute_head, held.minute_counts, held.hour_head, held.hour_counts, held.day_head, held.day_counts,
            account.currency, account.spent + account.reserved AS committed
        FROM unnest(g_org_id, g_agent_id, g_version, g_kind, g_wanted) WITH ORDINALITY
            AS g (org_id, agent_id, version, kind, wanted, n)
        LEFT JOIN external_agents AS agent
            ON agent.org_id = g.org_id AND agent.id = g.agent_id AND agent.org_id = ANY (orgs)
        LEFT JOIN external_agent_rate_windows AS held
            ON held.org_id = g.org_id AND held.agent_id = g.agent_id AND held.org_id = ANY (orgs)
        LEFT JOIN external_agent_budgets AS account
            ON account.org_id = g.org_id AND account.agent_id = g.agent_id AND account.org_id = ANY (orgs)
            AND account.currency = coalesce(agent.budget_config ->> 'currency', 'USD') AND account.month = month
            AND agent.budget_config IS NOT NULL
        ORDER BY g.n
    LOOP
        admitted := 0;
        refusal := 0;
        IF one.state = 0 THEN
            wanted := one.wanted;
            IF i_item IS NOT NULL THEN
                wanted := wanted - (SELECT count(*) FROM unnest(i_item) AS i (item) WHERE a_group[i.item] = one.n);
            END IF;
            room := CASE WHEN one.kind = 2 THEN 0 END;
            IF one.kind = 0 THEN
                IF one.minute_head < minute_now THEN
                    one.minute_counts := external_agents_advanced(one.minute_counts, one.minute_head, minute_now);
                    one.minute_head := minute_now;
                END IF;
                IF one.hour_head < hour_now THEN
                    one.hour_counts := external_agents_advanced(one.hour_counts, one.hour_head, hour_now);
                    one.hour_head := hour_now;
                END IF;
                IF one.day_head < day_now THEN
                    one.day_counts := external_agents_advanced(one.day_counts, one.day_head, day_now);
                    one.day_head := day_now;
                END IF;
                IF one.minute_limit IS NOT NULL THEN
                    SELECT sum(c) INTO used FROM unnest(one.minute_counts) AS c;
                    room := one.minute_limit - used;
                END IF;
                IF one.hour_limit IS NOT NULL THEN
                    SELECT sum(c) INTO used FROM unnest(one.hour_counts) AS c;
                    room := least(room, one.hour_limit - used);
                END IF;
                IF one.day_limit IS NOT NULL THEN
                    SELECT sum(c) INTO used FROM unnest(one.day_counts) AS c;
                    room := least(room, one.day_limit - used);
                END IF;
            END IF;
            -- Reservations of one agent are equal, so that what can be afforded is a number.
            affordable := CASE
                WHEN one.cap IS NULL THEN NULL
                WHEN one.amount IS NULL THEN CASE WHEN one.committed < one.cap THEN NULL ELSE 0 END
                WHEN one.amount = 0 THEN CASE WHEN one.committed <= one.cap THEN NULL ELSE 0 END
                ELSE greatest(0, div(one.cap - one.committed, one.amount))
            END;
            admitted := greatest(0, least(wanted, room, affordable));
            IF admitted < wanted THEN
                refusal := CASE WHEN room <= affordable OR affordable IS NULL THEN 6 ELSE 7 END;
            END IF;
            IF admitted > 0 AND one.kind = 0 THEN
                one.minute_counts[one.minute_head % 51 + 1] := one.minute_counts[one.minute_head % 51 + 1] + admitted;
                one.hour_counts[one.hour_head % 51 + 1] := one.hour_counts[one.hour_head % 51 + 1] + admitted;
                one.day_counts[one.day_head % 51 + 1] := one.day_counts[one.day_head % 51 + 1] + admitted;
                UPDATE external_agent_rate_windows AS held
                SET minute_head = one.minute_head, minute_counts = one.minute_counts, hour_head = one.hour_head,
                    hour_counts = one.hour_counts, day_head = one.day_head, day_counts = one.day_counts
                WHERE held.org_id = one.org_id AND held.agent_id = one.agent_id;
            END IF;
            IF admitted > 0 AND one.amount IS NOT NULL THEN
                UPDATE external_agent_budgets AS account SET reserved = account.reserved + admitted * one.amount
                WHERE account.org_id = one.org_id AND account.agent_id = one.agent_id
                    AND account.currency = one.currency AND account.month = month;
            END IF;
            IF one.kind = 0 AND coalesce(one.minute_limit, one.hour_limit, one.day_limit) IS NOT NULL THEN
                g_heads := g_heads || ARRAY[one.minute_head, one.hour_head, one.day_head];
                g_counts := g_counts || one.minute_counts || one.hour_counts || one.day_counts;
            END IF;
        END IF;
        g_state := g_state || one.state::smallint;
        g_admitted := g_admitted || admitted;
        g_refusal := g_refusal || refusal;
    END LOOP;

    IF 0 < ANY (g_admitted) THEN
        INSERT INTO external_agent_invocations (org_id, id, external_agent_id, lineage_hop_id, initiated_by, status,
            request_payload, attempts, reservation_amount, reservation_currency, cost_overrun, trace_id, created_at,
            instance_id)
        SELECT agent.org_id, a.id, agent.id, a.lineage_hop_id, a.initiated_by, 'running', a.request_payload::json, '[]',
            (agent.budget_config ->> 'max_cost_per_invocation')::numeric,
            CASE WHEN agent.budget_config ->> 'max_cost_per_invocation' IS NOT NULL
                THEN coalesce(agent.budget_config ->> 'currency', 'USD') END,
            false, a.trace_id, a.created_at, instance
        FROM (
            SELECT a.*, row_number() OVER (PARTITION BY a.g ORDER BY a.n) AS place
            FROM unnest(a_group, a_id, a_initiated_by, a_request_payload, a_trace_id, a_lineage_hop_id, a_created_at)
                WITH ORDINALITY
                AS a (g, id, initiated_by, request_payload, trace_id, lineage_hop_id, created_at, n)
            WHERE i_item IS NULL OR a.n <> ALL (i_item)
        ) AS a
        JOIN external_agents AS agent ON agent.org_id = g_org_id[a.g] AND agent.id = g_agent_id[a.g]
        WHERE agent.org_id = ANY (orgs) AND a.place <= g_admitted[a.g];
        IF cardinality(a_key) > 0 THEN
            -- What is in the way has expired, or its invocation is gone.
            INSERT INTO external_agent_idempotency_keys AS kept (org_id, agent_id, key, request_hash, invocation_id,
                created_at)
            SELECT g_org_id[a.g], g_agent_id[a.g], a.key, a.request_hash, a.id, moment
            FROM (
                SELECT a.*, row_number() OVER (PARTITION BY a.g ORDER BY a.n) AS place
                FROM unnest(a_group, a_id, a_key, a_request_hash) WITH ORDINALITY AS a (g, id, key, request_hash, n)
                WHERE i_item IS NULL OR a.n <> ALL (i_item)
            ) AS a
            WHERE a.place <= g_admitted[a.g] AND a.key IS NOT NULL
            ON CONFLICT ON CONSTRAINT pk_external_agent_idempotency_keys DO UPDATE
            SET request_hash = excluded.request_hash, invocation_id = excluded.invocation_id,
                created_at = excluded.created_at;
        END IF;
    END IF;
END
$$;
