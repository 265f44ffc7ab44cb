#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Keeps what one wants to read after a failure of host $1 in folder $2. No part of it may stop the removal.
set -u
host=$1 folder=$2
rm -rf "$folder"
mkdir -p "$folder"
docker logs "$host" >"$folder/console.log" 2>&1
inside() { timeout 30 docker exec "$host" "$@" 2>&1; }
inside journalctl --no-pager --output=short-precise >"$folder/journal.log"
inside systemctl --no-pager --failed >"$folder/failed-units.txt"
inside ls -lR /etc/moat /opt/moat/releases /run/moat --ignore=bundle --ignore=venv >"$folder/tree.txt"
# Secrets stay where they are: only logs and evidence are taken.
for path in /var/log/moat /var/lib/moat/evidence /var/lib/moat/installed.json; do
    docker cp --quiet "$host:$path" "$folder/" >/dev/null 2>&1
done
exit 0
