// Is it right here: self-tests, versions, configuration, warnings, and plans for other models.
import { request } from "./api.js";
import { bytes, clock, el, field, number, show, table } from "./dom.js";
import { calm, complain } from "./notice.js";

export async function open(main, signal) {
  show(main, el("h1", {}, "Health"), el("p", { class: "soft", role: "status" }, "Looking …"));
  const [health, status, models] = await Promise.all([request("GET", "/admin/health"), request("GET", "/admin/status"), request("GET", "/admin/models")]);
  if (signal.aborted) return;
  show(main, el("h1", {}, "Health"), kernels(health), versions(health, status), warnings(health.warnings), plan(models.data), configuration(health.config));
}

function kernels(health) {
  const card = (...inside) => el("section", { class: "card", "aria-label": "Kernels" }, el("h2", {}, "Kernels"), inside);
  if (!health.selftests.length) return card(el("p", {}, health.backend === "reference" ? "This server runs MLX's plain operations: there is no kernel to prove." : "No self-test is recorded for this machine."), el("p", { class: "soft" }, "A GPU's kernels prove themselves at first start; ", el("code", {}, "vecinfer doctor"), " repeats it."));
  return card(health.selftests.slice(0, 3).map((test) => [el("h3", {}, `${test.backend}, ${test.tested_at}`), el("p", { class: "soft break" }, test.geometries.join("; ")),
    table(`Kernels of ${test.backend}`, ["kernel", "verdict", "largest error", "allowed", "checks"], test.kernels.map((one) => [el("code", {}, one.kernel), verdictOf(one), one.error === null ? "did not run" : one.error.toExponential(1), one.limit.toExponential(1), one.num_checks]), "No kernels.")]));
}

function verdictOf(kernel) {
  if (!kernel.passed) return el("span", { class: "bad" }, `failed, replaced: ${kernel.detail}`);
  return kernel.num_checks ? el("span", { class: "good" }, "passed") : "not used by these geometries";
}

function versions(health, status) {
  const rows = [["server", health.version], ...Object.entries(status.versions)].map(([name, version]) => [name, version]);
  const layers = status.layers.total ? `${status.layers.packed} of ${status.layers.total} layers packed` : "";
  return el("section", { class: "card", "aria-label": "Versions" }, el("h2", {}, "Versions"), table("Versions", ["package", "version"], rows, ""), el("p", { class: "soft" }, [status.model.id, layers].filter(Boolean).join(" · ")));
}

function warnings(list) {
  return el("section", { class: "card", "aria-label": "Warnings" }, el("h2", {}, "Recent warnings"), table("Recent warnings", ["time", "level", "from", "message"], list.map((one) => [clock(one.at), el("span", { class: one.level === "warning" ? "warn" : "bad" }, one.level), one.logger, el("span", { class: "break" }, one.message)]), "None since the server started."));
}

function configuration(config) {
  const rows = [];
  for (const [section, values] of Object.entries(config)) {
    if (values !== null && typeof values === "object") for (const [key, value] of Object.entries(values)) rows.push([`${section}.${key}`, JSON.stringify(value)]);
    else rows.push([section, JSON.stringify(values)]);
  }
  return el("details", { class: "card" }, el("summary", {}, "Configuration as loaded"), table("Configuration", ["setting", "value"], rows.map(([key, value]) => [el("code", {}, key), el("span", { class: "break" }, value)]), ""));
}

function plan(models) {
  const model = el("input", { name: "model", value: "llama-3.1-8b", required: true });
  const context = el("input", { type: "number", min: 1, value: 32768, required: true });
  const bits = el("select", {}, [2, 1, 3, 4].map((n) => el("option", { value: n }, `${n}`)));
  const chip = el("input", { placeholder: "this machine's, else m4-pro" });
  const result = el("div", { "aria-live": "polite" });
  const form = el("form", {}, el("div", { class: "grid" }, field("Model: a preset or a folder", model), field("Tokens of a conversation", context), field("Bits", bits), field("Chip", chip)), el("button", { type: "submit" }, "Estimate"));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    calm();
    const query = new URLSearchParams({ model: model.value, context: context.value, bits: bits.value, chip: chip.value });
    try { show(result, planTable(await request("GET", `/admin/plan?${query}`))); } catch (error) { complain(error); }
  });
  return el("section", { class: "card", "aria-label": "Plan" }, el("h2", {}, "What would another model need?"), form, result,
    el("h3", {}, "On this machine already"), table("Models on this machine", ["model", "size", "fit"], models.map((one) => [el("span", { class: "break" }, one.name), bytes(one.weight_bytes), el("span", { class: one.fits ? "good" : "bad" }, one.fit)]), "Nothing in the Hugging Face cache."));
}

function planTable(found) {
  const sizes = Object.keys(found.caches[0].conversations);
  const rows = [["KV bytes per token", (c) => number(c.token_bytes)], ["one conversation", (c) => bytes(c.conversation_bytes)], ["decode, estimated", (c) => c.tokens_per_s === null ? "not known" : `${number(c.tokens_per_s, 1)} tokens/s`], ...sizes.map((gb) => [`conversations in ${gb} GB`, (c) => number(c.conversations[gb])])];
  return [el("p", { class: "break" }, `${found.model}: ${bytes(found.weight_bytes)} of weights on ${found.chip}; estimates, nothing was measured.`), table("Plan", ["", ...found.caches.map((one) => one.cache)], rows.map(([name, value]) => [name, ...found.caches.map(value)]), "")];
}
