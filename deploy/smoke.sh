#!/usr/bin/env bash
# Checks a running server with curl: probes, models, a chat with and without streaming, errors, metrics, status.
# Usage: deploy/smoke.sh [URL] [KEY_FILE]        URL: http://127.0.0.1:8080; $WAIT_S: how long to wait until ready (600)
# $VECINFER_ADMIN_KEY: for /admin/status. The key comes from a file (its first line) or $VECINFER_API_KEY, so that no process list shows it.
# Exit code: 0 when every check passed.
set -uo pipefail

url="${1:-http://127.0.0.1:8080}"
url="${url%/}"
key="${VECINFER_API_KEY:-}"
[[ -n "${2:-}" ]] && { key="$(grep -v '^[[:space:]]*\(#\|$\)' "$2" | head -n 1)" || exit 2; }
body="$(mktemp)"
trap 'rm -f "$body"' EXIT
failed=0
question='[{"role": "user", "content": "What is the capital of France? Answer in one word."}]'

# call PATH [curl options]: the status code; the answer lies in $body. The key goes in on standard input.
call() {
  local path="$1"
  shift
  { [[ -z "$key" ]] || printf 'header = "Authorization: Bearer %s"\n' "$key"; } |
    curl -sS -K - -o "$body" -w '%{http_code}' --max-time 300 "$@" "$url$path" 2>&1
}

# check NAME GOT_STATUS WANTED_STATUS [PATTERN the answer must have]
check() {
  local name="$1" got="$2" wanted="$3" pattern="${4:-}"
  if [[ "$got" != "$wanted" ]]; then
    echo "FAIL $name: got $got, wanted $wanted: $(head -c 300 "$body")"
  elif [[ -n "$pattern" ]] && ! grep -Eq -- "$pattern" "$body"; then
    echo "FAIL $name: the answer lacks $pattern: $(head -c 300 "$body")"
  else
    echo "ok   $name"
    return
  fi
  failed=$((failed + 1))
}

chat() {
  call /v1/chat/completions -H 'Content-Type: application/json' -d "$1"
}

until_ready() {
  local deadline=$((SECONDS + ${WAIT_S:-600}))
  while [[ "$(call /readyz)" == 503 ]] && ((SECONDS < deadline)); do
    echo "     not ready yet: $(head -c 200 "$body")"
    sleep 5
  done
}

check "/livez" "$(call /livez)" 200
until_ready
check "/readyz" "$(call /readyz)" 200 '"ok"'
check "/v1/models" "$(call /v1/models)" 200 '"object": ?"list"'
check "chat" "$(chat "{\"messages\": $question, \"max_tokens\": 16, \"temperature\": 0}")" 200 '"content": ?"[^"]'
check "chat, streamed" "$(chat "{\"messages\": $question, \"max_tokens\": 16, \"stream\": true}")" 200 '^data: \[DONE\]'
check "completion" "$(call /v1/completions -d '{"prompt": "Once upon a time", "max_tokens": 8}')" 200 '"text": ?"'
check "malformed JSON is a 400" "$(chat '{"messages": [')" 400 '"invalid_json"'
check "an unknown field is taken" "$(chat "{\"messages\": $question, \"max_tokens\": 8, \"no_such\": 1}")" 200 '"content":'
check "a wrong value is a 400 that names it" "$(chat "{\"messages\": $question, \"temperature\": \"hot\"}")" 400 'temperature'
check "an unknown model is a 404" "$(chat "{\"model\": \"no-such\", \"messages\": $question}")" 404 'model_not_found'
if [[ -n "$key" ]]; then
  saved="$key" key=wrong
  check "a wrong key is a 401" "$(call /v1/models)" 401 'invalid_api_key'
  key="$saved"
fi
check "/metrics" "$(call /metrics)" 200 '^vecinfer_generated_tokens_total [1-9]'
saved="$key" key="${VECINFER_ADMIN_KEY:-$key}"
status="$(call /admin/status)"
key="$saved"
case "$status" in
  200) check "/admin/status" 200 200 '"packed"' ;;
  401 | 403) echo "skip /admin/status: set VECINFER_ADMIN_KEY to the admin key" ;;
  *) check "/admin/status" other 200 ;;
esac
((failed == 0)) && echo "all passed" || echo "$failed failed"
((failed == 0))
