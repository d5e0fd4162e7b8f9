// Runs the checks of a client's script: one JSON line each, with the error's words where one fails.
export const PLAIN = process.env.CLIENTS_PLAIN_URL;
export const THINKING = process.env.CLIENTS_THINKING_URL;
export const MODEL = "scripted";
export const KEY = "local";
export const CAPITAL = "What is the capital of France?";
export const WEATHER = "What is the weather in Paris?";
export const WEATHERS = "What is the weather in Paris and Rome?";
export const PERSON = "Who is Ada? Give her name and age.";
const LIMIT_MS = 60_000;

const checks = [];

export function check(name, run) {
  checks.push([name, run]);
}

export function assert(truth, words) {
  if (!truth) throw new Error(`not so: ${words ?? ""}`);
}

export function equal(got, wanted) {
  if (JSON.stringify(got) !== JSON.stringify(wanted)) {
    throw new Error(`got ${JSON.stringify(got)}, wanted ${JSON.stringify(wanted)}`);
  }
}

export async function run() {
  const named = process.argv.slice(2);
  for (const [name, body] of checks) {
    if (named.length && !named.includes(name)) continue;
    const start = Date.now();
    let error = null;
    let timer;
    try {
      const late = new Promise((_, reject) => {
        timer = setTimeout(() => reject(new Error("no end within 60 s")), LIMIT_MS);
      });
      await Promise.race([body(), late]);
    } catch (failure) {
      const place = (failure?.stack ?? "").split("\n").find((line) => /\.mjs:\d+/.test(line) && !/harness/.test(line));
      error = `${failure?.name}: ${failure?.message}`.slice(0, 1500) + ` [${place?.trim() ?? ""}]`;
    }
    clearTimeout(timer);
    const line = { check: name, ok: error === null, error, s: (Date.now() - start) / 1000 };
    console.log("CHECK " + JSON.stringify(line));
  }
  process.exit(0);
}
