-- The counts of a window when time has gone on to another bucket. There are 51, that of bucket b at b % 51 + 1, and
-- their sum behind them: to add them up at every admission would take a quarter of its time.
CREATE FUNCTION external_agents_advanced(counts integer[], head bigint, new_head bigint) RETURNS integer[]
LANGUAGE plpgsql IMMUTABLE STRICT AS $$
DECLARE
    place integer;
BEGIN
    IF new_head - head >= 51 THEN
        RETURN array_fill(0, ARRAY[52]);
    END IF;
    FOR bucket IN head + 1 .. new_head LOOP
        place := bucket % 51 + 1;
        counts[52] := counts[52] - counts[place];
        counts[place] := 0;
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
-- g_heads, g_counts: the windows after the batch, 52 numbers each, of the groups of kind 0 that have limits, one after
--      the other.
-- i_item, i_state, i_invocation_id: admissions for which an earlier invocation answers: 4 its payload was another, 5 it
--      has not ended, 8 it has.
--
-- Locks are taken in one order everywhere: an instance, agents' windows by key, accounts by key, invocations. The clock
-- is read when they are held: windows never see time go back, and now() would be the transaction's start, before the
-- waiting.
--
-- Every statement finds its rows by the whole primary key, whatever the statistics say: reading, by a lateral subquery
-- that cannot be pulled up (FOR UPDATE, OFFSET 0); writing, by the conflict of an INSERT; deleting, one by one. A join
-- was tried: whether it looked up each row, or read all that the batch's organisations ever had, depended on statistics.
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
    windows external_agent_rate_windows[];
    k_spent numeric[];
    k_reserved numeric[];
    s_running external_agent_invocations[];
    g_amount numeric[];
    g_last integer[];
    taken external_agent_rate_windows[];
    running external_agent_invocations;
    s record;
    g record;
    a record;
    earlier record;
    admits boolean := cardinality(g_agent_id) > 0;
    its_month date;
    minute_now bigint;
    hour_now bigint;
    day_now bigint;
    first integer := 1;
    last integer;
    item integer;
    place integer;
    wanted integer;
    admitted integer;
    refusal smallint;
    state smallint;
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
        windows := ARRAY(
            SELECT held.whole
            FROM unnest(g_org_id, g_agent_id) AS element (org_id, agent_id)
            LEFT JOIN LATERAL (
                SELECT this AS whole FROM external_agent_rate_windows AS this
                WHERE this.org_id = element.org_id AND this.agent_id = element.agent_id FOR UPDATE
            ) AS held ON true
        );
    END IF;
    IF EXISTS (
        SELECT
        FROM unnest(k_org_id, k_agent_id, k_currency, k_month) AS element (org_id, agent_id, currency, month)
        LEFT JOIN LATERAL (
            SELECT true AS is_there FROM external_agent_budgets AS this
            WHERE this.org_id = element.org_id AND this.agent_id = element.agent_id
                AND this.currency = element.currency AND this.month = element.month
            OFFSET 0
        ) AS known ON true
        WHERE known.is_there IS NULL
    ) THEN
        -- Before any account is locked: whoever waits here for another who makes the same one, holds none.
        INSERT INTO external_agent_budgets (org_id, agent_id, currency, month, spent, reserved)
        SELECT element.org_id, element.agent_id, element.currency, element.month, 0, 0
        FROM unnest(k_org_id, k_agent_id, k_currency, k_month) AS element (org_id, agent_id, currency, month)
        CROSS JOIN LATERAL (
            SELECT FROM external_agents AS this WHERE this.org_id = element.org_id AND this.id = element.agent_id
            OFFSET 0
        ) AS owner
        ON CONFLICT DO NOTHING;
    END IF;
    SELECT array_agg(held.spent), array_agg(held.reserved) INTO k_spent, k_reserved
    FROM unnest(k_org_id, k_agent_id, k_currency, k_month) AS element (org_id, agent_id, currency, month)
    LEFT JOIN LATERAL (
        SELECT this.spent, this.reserved FROM external_agent_budgets AS this
        WHERE this.org_id = element.org_id AND this.agent_id = element.agent_id
            AND this.currency = element.currency AND this.month = element.month
        FOR UPDATE
    ) AS held ON true;

    FOR s IN
        SELECT * FROM unnest(s_org_id, s_id, s_released, s_charged, s_cost_amount)
            AS element (org_id, id, released, charged, cost_amount)
    LOOP
        DELETE FROM external_agent_invocations AS this
        WHERE this.org_id = s.org_id AND this.id = s.id AND NOT this.ended AND this.status = 'running'
        RETURNING this.* INTO running;
        settled := settled || FOUND;
        s_running := s_running || running;
        CONTINUE WHEN NOT FOUND;
        its_month := date_trunc('month', running.created_at AT TIME ZONE 'UTC');
        IF (running.reservation_amount IS NOT NULL
                AND (running.external_agent_id, running.reservation_currency, its_month)
                IS DISTINCT FROM (k_agent_id[s.released], k_currency[s.released], k_month[s.released]))
            OR (s.charged IS NOT NULL AND (running.external_agent_id, its_month)
                IS DISTINCT FROM (k_agent_id[s.charged], k_month[s.charged]))
        THEN
            RAISE EXCEPTION 'invocation % is settled as another agent''s, month''s or currency''s than it is', s.id;
        END IF;
        IF running.reservation_amount IS NOT NULL THEN
            k_reserved[s.released] := k_reserved[s.released] - running.reservation_amount;
        END IF;
        IF s.charged IS NOT NULL THEN
            k_spent[s.charged] := k_spent[s.charged] + s.cost_amount::numeric;
        END IF;
    END LOOP;
    IF true = ANY (settled) THEN
        INSERT INTO external_agent_invocations (org_id, id, external_agent_id, lineage_hop_id, parent_invocation_id,
            initiated_by, status, request_payload, response_payload, response_status, attempts, execution_time_ms,
            error_code, error_message, reservation_amount, reservation_currency, cost_amount, cost_currency,
            cost_overrun, trace_id, created_at, completed_at, instance_id, ended)
        SELECT this.org_id, this.id, this.external_agent_id, this.lineage_hop_id, this.parent_invocation_id,
            this.initiated_by, this.new_status, this.request_payload, this.new_response_payload::json,
            this.new_response_status, this.new_attempts::json, this.new_execution_time_ms, this.new_error_code,
            this.new_error_message, this.reservation_amount, this.reservation_currency, this.new_cost_amount::numeric,
            k_currency[this.new_charged], this.new_cost_overrun, this.trace_id, this.created_at, this.new_completed_at,
            this.instance_id, true
        FROM unnest(s_charged, s_status, s_response_payload, s_response_status, s_attempts, s_execution_time_ms,
            s_error_code, s_error_message, s_cost_amount, s_cost_overrun, s_completed_at, s_running) AS this
            (new_charged, new_status, new_response_payload, new_response_status, new_attempts, new_execution_time_ms,
            new_error_code, new_error_message, new_cost_amount, new_cost_overrun, new_completed_at)
        WHERE this.id IS NOT NULL;
    END IF;

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
            SELECT element.*, agent.*
            FROM unnest(g_org_id, g_agent_id, g_version, g_kind, g_wanted, g_account, windows)
                AS element (for_org_id, for_agent_id, for_version, kind, wanted, account)
            LEFT JOIN LATERAL (
                SELECT this.version, this.status,
                    (this.rate_limit_config ->> 'requests_per_minute')::numeric AS minute_limit,
                    (this.rate_limit_config ->> 'requests_per_hour')::numeric AS hour_limit,
                    (this.rate_limit_config ->> 'requests_per_day')::numeric AS day_limit,
                    (this.budget_config ->> 'max_cost_per_invocation')::numeric AS amount,
                    (this.budget_config ->> 'max_monthly_cost')::numeric AS cap
                FROM external_agents AS this
                WHERE this.org_id = element.for_org_id AND this.id = element.for_agent_id
                OFFSET 0
            ) AS agent ON true
        LOOP
            state := CASE
                WHEN g.agent_id IS NULL OR g.status IS NULL OR g.status = 'deleted' THEN 1
                WHEN g.version <> g.for_version THEN 2 WHEN g.status <> 'active' THEN 3 ELSE 0
            END;
            admitted := 0;
            refusal := 0;
            last := first - 1;
            IF state = 0 THEN
                wanted := g.wanted;
                FOREACH item IN ARRAY coalesce(i_item, '{}') LOOP
                    IF item >= first AND item < first + g.wanted THEN
                        wanted := wanted - 1;
                    END IF;
                END LOOP;
                room := CASE WHEN g.kind = 2 THEN 0 END;
                IF g.kind = 0 THEN
                    IF g.minute_head < minute_now THEN
                        g.minute_counts := external_agents_advanced(g.minute_counts, g.minute_head, minute_now);
                        g.minute_head := minute_now;
                    END IF;
                    IF g.hour_head < hour_now THEN
                        g.hour_counts := external_agents_advanced(g.hour_counts, g.hour_head, hour_now);
                        g.hour_head := hour_now;
                    END IF;
                    IF g.day_head < day_now THEN
                        g.day_counts := external_agents_advanced(g.day_counts, g.day_head, day_now);
                        g.day_head := day_now;
                    END IF;
                    room := least(g.minute_limit - g.minute_counts[52], g.hour_limit - g.hour_counts[52],
                        g.day_limit - g.day_counts[52]);
                END IF;
                -- Reservations of one agent are equal, so that what can be afforded is a number.
                affordable := CASE
                    WHEN g.cap IS NULL THEN NULL
                    WHEN g.amount IS NULL
                        THEN CASE WHEN k_spent[g.account] + k_reserved[g.account] >= g.cap THEN 0 END
                    WHEN g.amount = 0
                        THEN CASE WHEN k_spent[g.account] + k_reserved[g.account] > g.cap THEN 0 END
                    ELSE greatest(0, div(g.cap - k_spent[g.account] - k_reserved[g.account], g.amount))
                END;
                admitted := greatest(0, least(wanted, room, affordable));
                IF admitted < wanted THEN
                    refusal := CASE WHEN affordable IS NULL OR room <= affordable THEN 6 ELSE 7 END;
                END IF;
                last := last + admitted;
                FOREACH item IN ARRAY coalesce(i_item, '{}') LOOP
                    IF item BETWEEN first AND last THEN
                        last := last + 1;
                    END IF;
                END LOOP;
                IF admitted > 0 AND g.kind = 0 THEN
                    place := g.minute_head % 51 + 1;
                    g.minute_counts[place] := g.minute_counts[place] + admitted;
                    g.minute_counts[52] := g.minute_counts[52] + admitted;
                    place := g.hour_head % 51 + 1;
                    g.hour_counts[place] := g.hour_counts[place] + admitted;
                    g.hour_counts[52] := g.hour_counts[52] + admitted;
                    place := g.day_head % 51 + 1;
                    g.day_counts[place] := g.day_counts[place] + admitted;
                    g.day_counts[52] := g.day_counts[52] + admitted;
                    taken := taken || ROW(g.org_id, g.agent_id, g.minute_head, g.minute_counts, g.hour_head,
                        g.hour_counts, g.day_head, g.day_counts)::external_agent_rate_windows;
                END IF;
                IF admitted > 0 AND g.amount IS NOT NULL THEN
                    k_reserved[g.account] := k_reserved[g.account] + admitted * g.amount;
                END IF;
                IF g.kind = 0 AND coalesce(g.minute_limit, g.hour_limit, g.day_limit) IS NOT NULL THEN
                    g_heads := g_heads || ARRAY[g.minute_head, g.hour_head, g.day_head];
                    g_counts := g_counts || g.minute_counts || g.hour_counts || g.day_counts;
                END IF;
            END IF;
            first := first + g.wanted;
            g_state := g_state || state;
            g_admitted := g_admitted || admitted;
            g_refusal := g_refusal || refusal;
            g_amount := g_amount || g.amount;
            g_last := g_last || last;
        END LOOP;

        IF 0 < ANY (g_admitted) THEN
            INSERT INTO external_agent_rate_windows
            SELECT * FROM unnest(taken)
            ON CONFLICT ON CONSTRAINT pk_external_agent_rate_windows DO UPDATE
            SET minute_head = excluded.minute_head, minute_counts = excluded.minute_counts,
                hour_head = excluded.hour_head, hour_counts = excluded.hour_counts,
                day_head = excluded.day_head, day_counts = excluded.day_counts;
            INSERT INTO external_agent_invocations (org_id, id, external_agent_id, lineage_hop_id, initiated_by, status,
                request_payload, attempts, reservation_amount, reservation_currency, cost_overrun, trace_id, created_at,
                instance_id)
            SELECT g_org_id[this.g], this.id, g_agent_id[this.g], this.lineage_hop_id, this.initiated_by, 'running',
                this.request_payload::json, '[]', g_amount[this.g],
                CASE WHEN g_amount[this.g] IS NOT NULL THEN k_currency[g_account[this.g]] END, false, this.trace_id,
                this.created_at, instance
            FROM unnest(a_group, a_id, a_initiated_by, a_request_payload, a_trace_id, a_lineage_hop_id, a_created_at)
                WITH ORDINALITY
                AS this (g, id, initiated_by, request_payload, trace_id, lineage_hop_id, created_at, n)
            WHERE this.n <= g_last[this.g] AND (i_item IS NULL OR this.n <> ALL (i_item));
            IF cardinality(a_key) > 0 THEN
                -- What is in the way has expired, or its invocation is gone.
                INSERT INTO external_agent_idempotency_keys (org_id, agent_id, key, request_hash, invocation_id,
                    created_at)
                SELECT g_org_id[this.g], g_agent_id[this.g], this.key, this.request_hash, this.id, moment
                FROM unnest(a_group, a_id, a_key, a_request_hash) WITH ORDINALITY
                    AS this (g, id, key, request_hash, n)
                WHERE this.n <= g_last[this.g] AND (i_item IS NULL OR this.n <> ALL (i_item)) AND this.key IS NOT NULL
                ON CONFLICT ON CONSTRAINT pk_external_agent_idempotency_keys DO UPDATE
                SET request_hash = excluded.request_hash, invocation_id = excluded.invocation_id,
                    created_at = excluded.created_at;
            END IF;
        END IF;
    END IF;

    INSERT INTO external_agent_budgets AS held (org_id, agent_id, currency, month, spent, reserved)
    SELECT *
    FROM unnest(k_org_id, k_agent_id, k_currency, k_month, k_spent, k_reserved)
        AS this (org_id, agent_id, currency, month, spent, reserved)
    WHERE this.spent IS NOT NULL
    ON CONFLICT ON CONSTRAINT pk_external_agent_budgets DO UPDATE
    SET spent = excluded.spent, reserved = excluded.reserved
    WHERE (held.spent, held.reserved) IS DISTINCT FROM (excluded.spent, excluded.reserved);
END
$$;
