//! The tables.

/// Each brings the tables one version on. Never change one that was released: add another.
///
/// A program works with tables one version older or newer than its own, so that nodes can be replaced
/// one by one: a step may add tables, columns with defaults and indexes, and may remove only what the
/// version before it no longer uses.
pub(crate) const MIGRATIONS: &[&str] = &["
    -- Numbers chosen once: the count of shards, the first day with a partition of its own.
    CREATE TABLE settings (
        name  text PRIMARY KEY,
        value bigint NOT NULL
    );

    -- The registry. Its counter is locked by every change until that is committed, so that changes
    -- become visible in the order of their numbers.
    CREATE TABLE counter (
        one      boolean PRIMARY KEY DEFAULT true CHECK (one),
        sequence bigint NOT NULL
    ) WITH (fillfactor = 10);
    INSERT INTO counter (sequence) VALUES (0);
    -- `members` has a hash of each top-level member with its value: what lists are filtered by.
    CREATE TABLE objects (
        kind     text NOT NULL,
        id       uuid NOT NULL,
        account  uuid NOT NULL,
        revision bigint NOT NULL,
        members  bigint[] NOT NULL,
        body     text NOT NULL,
        PRIMARY KEY (kind, id)
    );
    CREATE INDEX objects_of_account ON objects (account, kind, id);
    CREATE INDEX objects_by_member ON objects USING gin (members);
    -- The scope is the account, or empty where a key is unique on the installation.
    CREATE TABLE keys (
        kind   text NOT NULL,
        scope  bytea NOT NULL,
        key    text NOT NULL,
        value  bytea NOT NULL,
        object uuid NOT NULL
    );
    CREATE UNIQUE INDEX keys_are_unique ON keys (kind, scope, key, sha256(value));
    CREATE INDEX keys_of_object ON keys (kind, object);
    CREATE TABLE audit (
        sequence bigint PRIMARY KEY,
        at       bigint NOT NULL,
        account  uuid NOT NULL,
        actor    text NOT NULL,
        address  text,
        action   text NOT NULL,
        kind     text NOT NULL,
        object   uuid NOT NULL,
        changed  text NOT NULL
    );
    CREATE INDEX audit_of_account ON audit (account, sequence);

    -- The history. Who appends to a shard locks its row; `writer` names the transaction that was last.
    CREATE TABLE shards (
        shard  smallint PRIMARY KEY,
        seq    bigint NOT NULL,
        writer bigint NOT NULL
    ) WITH (fillfactor = 10);
    CREATE TABLE series (
        id      bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
        account uuid NOT NULL,
        kind    smallint NOT NULL,
        object  uuid NOT NULL,
        UNIQUE (account, kind, object)
    );
    -- What the parameters of messages are called: a number never means another name.
    CREATE TABLE names (
        id   integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
        name text NOT NULL UNIQUE
    );
    -- Times are microseconds since 1970. A partition a day: see `buckets`.
    CREATE TABLE messages (
        series   bigint NOT NULL,
        at       bigint NOT NULL,
        received bigint NOT NULL,
        shard    smallint NOT NULL,
        seq      bigint NOT NULL,
        hash     bigint NOT NULL,
        body     bytea NOT NULL
    ) PARTITION BY RANGE (at);
    CREATE INDEX messages_of_series ON messages (series, at, seq);
    CREATE INDEX messages_of_shard ON messages (shard, seq);
    CREATE TABLE buckets (
        bucket integer PRIMARY KEY,
        low    bigint NOT NULL,
        high   bigint NOT NULL
    );
    -- The last message that each shard put into each bucket: where the tail has to look.
    CREATE TABLE ends (
        shard  smallint NOT NULL,
        bucket integer NOT NULL,
        seq    bigint NOT NULL,
        PRIMARY KEY (shard, bucket)
    ) WITH (fillfactor = 50);
    CREATE TABLE usage (
        shard    smallint NOT NULL,
        bucket   integer NOT NULL,
        account  uuid NOT NULL,
        messages bigint NOT NULL,
        bytes    bigint NOT NULL,
        PRIMARY KEY (shard, bucket, account)
    ) WITH (fillfactor = 50);
    -- The newest values of each series, folded from the tail up to `folds.seq`.
    CREATE TABLE folds (
        shard smallint PRIMARY KEY,
        seq   bigint NOT NULL
    ) WITH (fillfactor = 10);
    CREATE TABLE last_values (
        series bigint PRIMARY KEY,
        newest bigint NOT NULL,
        body   bytea NOT NULL
    ) WITH (fillfactor = 70);
", "
    -- What MQTT clients retain; topics in the order of their bytes.
    CREATE TABLE retained (
        account       uuid NOT NULL,
        topic         text COLLATE \"C\" NOT NULL,
        bytes         bigint NOT NULL,
        at_least_once boolean NOT NULL,
        expires_at    bigint,
        payload       bytea NOT NULL,
        props         bytea NOT NULL,
        PRIMARY KEY (account, topic)
    );
    -- The wills of clients that are connected, and when the processes that they are connected to were last heard of.
    CREATE TABLE wills (
        account   uuid NOT NULL,
        client_id text COLLATE \"C\" NOT NULL,
        number    bigint NOT NULL,
        owner     bigint NOT NULL,
        will      text NOT NULL,
        PRIMARY KEY (account, client_id)
    );
    CREATE INDEX wills_of_owner ON wills (owner);
    CREATE TABLE will_owners (
        owner   bigint PRIMARY KEY,
        seen_at timestamptz NOT NULL
    ) WITH (fillfactor = 50);
"];
