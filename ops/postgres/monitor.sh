# shellcheck shell=bash
# The role of postgres_exporter: sees statistics, reads no table. Run once, by the image of Postgres, for an empty volume.
psql -v ON_ERROR_STOP=1 -v password="$MONITOR_PASSWORD" --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
CREATE ROLE monitor LOGIN PASSWORD :'password' IN ROLE pg_monitor;
SQL
