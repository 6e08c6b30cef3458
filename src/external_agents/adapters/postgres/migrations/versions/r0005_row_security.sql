-- What has to look beyond one organisation, or to own the tables, runs as their owner, and does no more than this. The
-- search path is fixed, temporary tables last: nobody can put something of his own in the place of a name.

-- The keys of these ids, for whoever knows an id: before a key is found, its organisation is unknown.
CREATE FUNCTION external_agents_api_keys(ids uuid[]) RETURNS SETOF api_keys
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = SCHEMA, pg_temp AS $$
    SELECT * FROM api_keys WHERE id = ANY (ids)
$$;

-- When these API keys were used, at most once an hour (UTC) each: last_used_at goes forward, and nothing else changes.
CREATE FUNCTION external_agents_note_uses(ids uuid[], moments timestamptz[]) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = SCHEMA, pg_temp AS $$
    UPDATE api_keys SET last_used_at = used.at
    FROM (
        -- Locked in the order of their ids: other processes note uses of the same keys. What has changed by then is
        -- judged anew.
        SELECT key.id, use.at
        FROM unnest(ids, moments) AS use (id, at) JOIN api_keys AS key ON key.id = use.id
        WHERE key.last_used_at IS NULL OR key.last_used_at < date_trunc('hour', use.at, 'UTC')
        ORDER BY key.id FOR NO KEY UPDATE OF key
    ) AS used
    WHERE api_keys.id = used.id
$$;

-- The ids of the secret keys that something hangs on, each with those that would do as well; of rows nothing.
CREATE FUNCTION external_agents_needed_keys() RETURNS SETOF text[]
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = SCHEMA, pg_temp AS $$
DECLARE
    needed text := '';
BEGIN
    -- One step along the index for each key, and not one for each row.
    LOOP
        SELECT min(key_id) INTO needed FROM external_agent_secrets WHERE key_id > needed;
        EXIT WHEN needed IS NULL;
        RETURN NEXT ARRAY[needed];
    END LOOP;
    needed := '';
    LOOP
        SELECT min(hash_key_id) INTO needed FROM api_keys WHERE revoked_at IS NULL AND hash_key_id > needed;
        EXIT WHEN needed IS NULL;
        -- An API key that is revoked or has expired needs no key any more.
        IF EXISTS (
            SELECT FROM api_keys WHERE hash_key_id = needed AND revoked_at IS NULL
                AND (expires_at IS NULL OR expires_at > clock_timestamp())
        ) THEN
            RETURN NEXT needed || ARRAY(SELECT key_id FROM api_key_hash_keys WHERE hash_key_id = needed);
        END IF;
    END LOOP;
END
$$;

-- Which organisations own the first invocations that an instance has running; of them their ids alone.
CREATE FUNCTION external_agents_running_organisations(instance uuid, at_most integer) RETURNS text[]
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = SCHEMA, pg_temp AS $$
    SELECT coalesce(array_agg(DISTINCT org_id), '{}') FROM (
        SELECT this.org_id FROM external_agent_invocations AS this
        WHERE this.instance_id = instance AND NOT this.ended AND this.status = 'running'
            AND this.id >= (SELECT instances.running_from FROM instances WHERE instances.id = instance)
        ORDER BY this.id LIMIT at_most
    ) AS first
$$;

-- Removes an instance, unless it has something running.
CREATE FUNCTION external_agents_forget_instance(instance uuid) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = SCHEMA, pg_temp AS $$
    DELETE FROM instances WHERE instances.id = instance AND NOT EXISTS (
        SELECT FROM external_agent_invocations AS this
        WHERE this.instance_id = instances.id AND this.id >= instances.running_from AND NOT this.ended
            AND this.status = 'running'
    )
$$;

-- Deletes the oldest keys that have expired, `at_once` and those of the same moment as the last; returns how many.
CREATE FUNCTION external_agents_clear_idempotency_keys(at_once integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = SCHEMA, pg_temp AS $$
DECLARE
    until timestamptz;
    expired_at timestamptz := clock_timestamp() - interval '24 hours';
    cleared integer;
BEGIN
    SELECT created_at INTO until FROM external_agent_idempotency_keys
    WHERE created_at <= expired_at ORDER BY created_at LIMIT 1 OFFSET at_once - 1;
    -- A time, not the keys themselves: a DELETE by nothing but a bound of created_at runs wherever the rows lie.
    DELETE FROM external_agent_idempotency_keys WHERE created_at <= coalesce(until, expired_at);
    GET DIAGNOSTICS cleared = ROW_COUNT;
    RETURN cleared;
END
$$;

-- Makes the partition of a month, given by its first day, and moves there what strayed into the default one. Nobody has
-- rights on it, for they would reach its rows past the policy of the whole table; not by default privileges either.
CREATE FUNCTION external_agents_add_partition(month date) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = SCHEMA, pg_temp AS $$
DECLARE
    name text := 'external_agent_invocations_' || to_char(month, 'YYYY_MM');
    bounds uuid[];
    columns text;
    grantee text;
BEGIN
    IF extract(day FROM month) <> 1 OR month NOT BETWEEN current_date - 62 AND current_date + 3660 THEN
        RAISE EXCEPTION '% is not the first day of a month that partitions are made for', month;
    END IF;
    -- The first UUIDv7 of this month, and of the next.
    bounds := ARRAY(
        SELECT (lpad(to_hex((extract(epoch FROM edge) * 1000)::bigint), 12, '0') || '70008000000000000000')::uuid
        FROM unnest(ARRAY[month, (month + interval '1 month')::date]) AS edge
    );
    SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) INTO columns FROM pg_attribute
    WHERE attrelid = 'external_agent_invocations'::regclass AND attnum > 0 AND NOT attisdropped;
    EXECUTE format('CREATE TABLE %I (LIKE external_agent_invocations INCLUDING DEFAULTS)', name);
    EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', name);
    FOR grantee IN
        SELECT DISTINCT CASE WHEN acl.grantee = 0 THEN 'PUBLIC' ELSE acl.grantee::regrole::text END
        FROM pg_class, aclexplode(relacl) AS acl
        WHERE pg_class.oid = quote_ident(name)::regclass AND acl.grantee <> relowner
    LOOP
        EXECUTE format('REVOKE ALL ON %I FROM %s', name, grantee);
    END LOOP;
    -- Nothing may stray in between the move and the attachment.
    LOCK TABLE external_agent_invocations_default IN ACCESS EXCLUSIVE MODE;
    EXECUTE format(
        'WITH strays AS ('
        'DELETE FROM external_agent_invocations_default WHERE id >= %L AND id < %L RETURNING %s'
        ') INSERT INTO %I (%s) SELECT * FROM strays',
        bounds[1], bounds[2], columns, name, columns
    );
    EXECUTE format(
        'ALTER TABLE external_agent_invocations ATTACH PARTITION %I FOR VALUES FROM (true, %L) TO (true, %L)',
        name, bounds[1], bounds[2]
    );
END
$$;

REVOKE ALL ON FUNCTION external_agents_api_keys, external_agents_note_uses, external_agents_needed_keys,
    external_agents_running_organisations, external_agents_forget_instance, external_agents_clear_idempotency_keys, external_agents_add_partition FROM PUBLIC;
