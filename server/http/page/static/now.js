// What the server does now: model, memory, conversations, the last requests, 15 minutes.
import { request } from "./api.js";
import { bytes, clock, duration, el, number, percent, show, table, update } from "./dom.js";
import { complain, follow } from "./notice.js";
import { sparkline } from "./plot.js";

const COLOURS = 6;
const colours = new Map();

export async function open(main, signal) {
  const parts = { head: el("div", { class: "grid" }), pool: el("section", { class: "card", "aria-label": "Memory for conversations" }), running: el("section", { class: "card", "aria-label": "Running" }), history: el("div", { class: "grid" }), past: el("section", { class: "card", "aria-label": "Last requests" }) };
  show(main, el("h1", {}, "Now"), parts.head, parts.pool, parts.running, parts.history, parts.past);
  await follow("/admin/live", signal, (event, data) => {
    if (event === "history") return drawHistory(parts.history, data);
    colour(data.activity.running);
    drawHead(parts.head, data);
    drawPool(parts.pool, data);
    drawRunning(parts.running, data.activity.running);
    drawPast(parts.past, data.activity.past);
  });
}

// A conversation keeps its colour as long as it runs, in the pool's picture and in its row.
function colour(running) {
  for (const id of [...colours.keys()]) if (!running.some((one) => one.id === id)) colours.delete(id);
  for (const { id } of running) {
    if (colours.has(id)) continue;
    let free = 0;
    while ([...colours.values()].includes(free)) free += 1;
    colours.set(id, free);
  }
}

const colourOf = (one) => `c${colours.get(one.id) % COLOURS}`;

function drawHead(parent, data) {
  const packing = data.packing;
  const state = packing.progress === null || packing.progress === undefined ? packing.state : `${packing.state} ${percent(packing.progress)}`;
  const bits = data.codec?.served?.key_bits ? `keys ${data.codec.served.key_bits}, values ${data.codec.served.value_bits} bits` : "";
  const kv = data.kv;
  update(parent,
    el("section", { class: "card", "aria-label": "Model" }, el("h2", {}, "Model"), el("div", { class: "break" }, el("strong", { id: "model" }, data.model.id || "loading")),
      el("div", { class: "soft" }, data.state === "ready" ? `context ${number(data.model.context_len)} tokens · ${data.backend}` : `${data.state} ${percent(data.progress)} ${data.detail}`),
      el("div", { class: "soft" }, `up ${duration(data.uptime_s)}`)),
    el("section", { class: "card", "aria-label": "Packing" }, el("h2", {}, "Conversations are held"), el("div", { class: "big", id: "packing" }, state), el("div", { class: "soft break" }, [bits, packing.detail].filter(Boolean).join(" · "))),
    el("section", { class: "card", "aria-label": "Memory" }, el("h2", {}, "Memory"), el("table", {}, el("tbody", {},
      [["weights", data.memory?.weights_bytes], ["conversations, in use", kv?.held_bytes], ["conversations, all", kv?.budget_bytes], ["codec tables", kv?.table_bytes], ["process", data.memory?.process_bytes], ["prefixes on disk", data.prefix_cache?.disk?.bytes], ["prefixes on disk, at most", data.prefix_cache?.disk?.max_bytes]]
        .filter(([, size]) => size !== undefined && size !== null)
        .map(([name, size]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", { class: "number" }, bytes(size))))))),
    el("section", { class: "card", "aria-label": "Requests" }, el("h2", {}, "Requests"), el("div", { class: "big" }, `${data.requests.running} running`), el("div", { class: "soft" }, `${data.requests.waiting} waiting`),
      kv?.ratio > 1 ? el("div", { class: "soft" }, `${number(kv.ratio, 1)} times smaller than float16`) : null));
}

function drawPool(parent, data) {
  const kv = data.kv;
  const heading = el("h2", {}, "Pool");
  if (!kv) return update(parent, heading, el("p", { class: "soft" }, "Nothing is held yet."));
  const rows = data.activity.running.filter((one) => one.pages > 0);
  const paged = kv.pages.total > 0;
  const total = paged ? kv.pages.total : kv.budget_bytes;
  const parts = [];
  if (paged) {
    const own = rows.reduce((sum, one) => sum + one.pages, 0);
    // Pages that several share count with each of them: then the parts are scaled to what is used.
    const scale = own > kv.pages.used ? kv.pages.used / own : 1;
    rows.forEach((one) => parts.push([colourOf(one), one.pages * scale, `${one.id.slice(-8)}: ${number(one.pages)} pages${scale < 1 ? ", some shared" : ""}`, true]));
    parts.push(["kept", Math.max(0, kv.pages.used - own), "kept prompts"], ["reserved", kv.pages.reserved, "promised"]);
  } else {
    const kept = kv.held_bytes_by_part.snapshots ?? 0;
    parts.push(["c0", kv.held_bytes - kept, "running"], ["kept", kept, "kept prompts"]);
  }
  const used = parts.reduce((sum, part) => sum + part[1], 0);
  parts.push(["free", Math.max(0, total - used), "free"]);
  const unit = paged ? (value) => `${number(value)} pages` : bytes;
  const wordsOf = ([, size, name, whole]) => (whole ? name : `${name}: ${unit(Math.round(size))}`);
  const bar = el("div", { class: "pool", role: "img", id: "pool", "data-used": used.toFixed(3), "aria-label": parts.map(wordsOf).join(", ") });
  for (const [colour, size] of parts.filter((part) => part[1] > 0)) {
    const part = el("span", { class: colour });
    part.style.flexGrow = String(size);
    bar.append(part);
  }
  const words = paged ? `${number(kv.pages.used)} of ${number(total)} pages of 64 tokens in use` : `${bytes(kv.held_bytes)} of ${bytes(total)} in use, exact caches without pages`;
  update(parent, heading, bar, el("ul", { class: "legend" }, parts.filter((part) => part[1] > 0).map(([colour, size, name, whole]) => el("li", {}, el("i", { class: colour }), wordsOf([colour, size, name, whole])))), el("p", { class: "soft" }, words));
}

function drawRunning(parent, running) {
  const rows = running.map((one) => [
    [el("i", { class: `chip ${colourOf(one)}` }), el("code", {}, one.id.slice(-8))], one.route, phaseOf(one), number(one.generated_tokens), number(one.tokens_per_s, 1), one.pages ? number(one.pages) : "–", duration(one.age_s),
    el("button", { type: "button", class: "danger", "data-key": one.id, "aria-label": `Cancel ${one.id.slice(-8)}`, onclick: () => request("POST", `/admin/requests/${encodeURIComponent(one.id)}/cancel`).catch(complain) }, "Cancel")]);
  update(parent, el("h2", {}, "Running"), table("Running conversations", ["request", "route", "phase", "tokens", "tokens/s", "pages", "age", ""], rows, "No conversation runs.", running.map((one) => one.id)));
}

function phaseOf(one) {
  if (one.phase !== "reading") return one.phase;
  return el("span", {}, `reading ${number(one.read_tokens)} of ${number(one.prompt_tokens)} `, el("progress", { max: one.prompt_tokens, value: one.read_tokens, "aria-label": "Prompt read" }));
}

function drawPast(parent, past) {
  const rows = past.map((one) => [clock(one.started_at), one.route, one.outcome, duration(one.time_to_first_token_s), number(one.tokens_per_s, 1), number(one.generated_tokens), `${number(one.prompt_tokens)}, ${percent(one.prompt_tokens ? one.cached_tokens / one.prompt_tokens : 0)} cached`]);
  update(parent, el("h2", {}, "Last requests"), table("Last requests", ["time", "route", "end", "first token", "tokens/s", "tokens", "prompt"], rows, "None yet.", past.map((one) => one.id)));
}

function drawHistory(parent, data) {
  update(parent, sparkline("tokens/s", data.ages_s, data.tokens_per_s, data.span_s, (v) => number(v, 1)), sparkline("requests", data.ages_s, data.requests, data.span_s, (v) => number(v)), sparkline("memory held", data.ages_s, data.held_bytes, data.span_s, bytes));
}
