#!/bin/sh
# Starts one of two PostgreSQL servers, of which one is the primary and the other its standby. It never promotes: that is
# the operator's decision (docker/README.md, "Many machines"). The environment:
#
#     PGDATA   the data directory; its parent must be writable
#     PEER     where the other server is, as parameters of libpq: host=postgres-2
#     SECRETS  the directory with the passwords of the roles `profiles` and `replicator`: profiles_password and
#              replication_password; /run/secrets by default
#
# A server that was the primary, or has no data, waits until the other one answers: it may have been promoted meanwhile,
# and reads from two primaries would be stale. If the file `alone` exists beside PGDATA, the server starts without the
# other one, once; without data, it creates the database.
#
# Arguments are further options of `postgres`. Its configuration files stand beside this script.
set -eu
umask 077
here=$(cd "$(dirname "$0")" && pwd)
secrets=${SECRETS:-/run/secrets}

PGPASSWORD=$(cat "$secrets/replication_password")
export PGPASSWORD
peer="$PEER user=replicator dbname=postgres connect_timeout=3"
new="$PGDATA.new"
alone="$(dirname "$PGDATA")/alone"

role_of_peer() {
    psql -XAtq -d "$peer" -c "SELECT CASE WHEN pg_is_in_recovery() THEN 'standby' ELSE 'primary' END" || echo unreachable
}

create_database() {
    initdb --pgdata="$new" --username=postgres --encoding=UTF8 --locale=C --auth=trust --data-checksums >/dev/null
    # Nothing else can reach it. Not with our configuration, in which commits wait for a standby; none exists yet.
    pg_ctl --pgdata="$new" --wait --silent --log="$new/create.log" \
        --options="-c listen_addresses='' -c unix_socket_directories='$new'" start
    profiles_password=$(cat "$secrets/profiles_password") psql -Xq -v ON_ERROR_STOP=1 -h "$new" -U postgres -d postgres <<'SQL'
\getenv profiles_password profiles_password
\getenv replication_password PGPASSWORD
CREATE ROLE profiles LOGIN PASSWORD :'profiles_password';
CREATE DATABASE profiles OWNER profiles;
-- So that `profiles doctor` sees the standby.
GRANT pg_monitor TO profiles;
CREATE ROLE replicator LOGIN REPLICATION PASSWORD :'replication_password';
-- For pg_rewind, see its documentation.
GRANT pg_checkpoint TO replicator;
GRANT EXECUTE ON FUNCTION pg_ls_dir(text, boolean, boolean) TO replicator;
GRANT EXECUTE ON FUNCTION pg_stat_file(text, boolean) TO replicator;
GRANT EXECUTE ON FUNCTION pg_read_binary_file(text) TO replicator;
GRANT EXECUTE ON FUNCTION pg_read_binary_file(text, bigint, bigint, boolean) TO replicator;
SQL
    pg_ctl --pgdata="$new" --wait --silent --mode=fast stop
}

become_standby() {
    # Remove what an operator may have set while the primary had no standby; it is not meant for this server.
    sed -i '/^synchronous_standby_names/d' "$1/postgresql.auto.conf"
    touch "$1/standby.signal"
}

# What an interrupted start left behind.
rm -rf "$new"
until [ -e "$PGDATA/standby.signal" ]; do
    role=$(role_of_peer)
    if [ "$role" = primary ] && [ ! -e "$PGDATA/PG_VERSION" ]; then
        echo "start.sh: copying the primary"
        pg_basebackup --pgdata="$new" --dbname="$peer" --checkpoint=fast
        become_standby "$new"
        mv "$new" "$PGDATA"
    elif [ "$role" = primary ]; then
        echo "start.sh: the other server was promoted; this one becomes its standby"
        # pg_rewind reads the timeline from the last checkpoint, and the first one on the new timeline may be due.
        psql -Xq -d "$peer" -c CHECKPOINT
        # With our configuration: it keeps WAL that pg_rewind needs and that its crash recovery would recycle otherwise.
        pg_rewind --target-pgdata="$PGDATA" --source-server="$peer" --config-file="$here/postgresql.conf"
        become_standby "$PGDATA"
    elif [ "$role" = standby ] && [ -e "$PGDATA/PG_VERSION" ]; then
        break
    elif [ "$role" = unreachable ] && [ -e "$alone" ]; then
        echo "start.sh: starting without the other server"
        if [ ! -e "$PGDATA/PG_VERSION" ]; then
            create_database
            mv "$new" "$PGDATA"
        fi
        break
    else
        echo "start.sh: waiting for the other server, which is $role; to start without it, create the file $alone"
        sleep 2
    fi
done
rm -f "$alone"
# Only a standby uses primary_conninfo. The password is in the environment.
exec postgres -D "$PGDATA" -c config_file="$here/postgresql.conf" -c hba_file="$here/pg_hba.conf" \
    -c primary_conninfo="$PEER user=replicator" "$@"
