#!/usr/bin/env bash
# curl: a plain answer, a stream, and what a body that is no JSON gets.
#   BASE_URL=http://127.0.0.1:8000/v1 examples/clients/curl.sh
set -euo pipefail
base=${BASE_URL:-http://127.0.0.1:8000/v1}
ask='"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0'

echo "== plain"
curl -sS "$base/chat/completions" -H 'content-type: application/json' -d "{$ask}"
echo
echo "== stream"
curl -sSN "$base/chat/completions" -H 'content-type: application/json' -H 'authorization: Bearer EMPTY' -d "{$ask, \"stream\": true}"
echo "== a trailing comma"
curl -sS -w '\nstatus %{http_code}\n' "$base/chat/completions" -H 'content-type: application/json' -d "{$ask,}"
