// Codecs: fit one, watch it, read its report, use, compare, delete.
import { request } from "./api.js";
import { bytes, clock, duration, el, field, number, percent, renew, show, table, update } from "./dom.js";
import { calm, complain, follow } from "./notice.js";
import { plot } from "./plot.js";

export async function open(main, signal) {
  const view = { jobs: el("section", { class: "card", "aria-label": "Calibrations" }), artifacts: el("section", { class: "card", "aria-label": "Stored codecs" }), report: el("section", { "aria-label": "Report", "aria-live": "polite" }), chosen: [], following: new Set(), signal };
  show(main, el("h1", {}, "Codecs"), calibrate(view), view.jobs, view.artifacts, view.report);
  await refresh(view);
}

async function refresh(view) {
  const [jobs, artifacts] = await Promise.all([request("GET", "/admin/calibrations"), request("GET", "/admin/artifacts")]);
  drawJobs(view, jobs.data);
  drawArtifacts(view, artifacts.data);
  for (const job of jobs.data) if (!job.ended_at && !view.following.has(job.id)) watch(view, job.id);
}

function calibrate(view) {
  const file = el("input", { type: "file", accept: ".txt,.md,.jsonl,.json,text/*" });
  const text = el("textarea", { rows: 3, placeholder: "Leave empty to use the model's own answers to built-in prompts" });
  const select = (values) => el("select", {}, values.map(([value, name]) => el("option", { value }, name)));
  const bits = select([["", "as configured"], ["1", "1 bit"], ["2", "2 bits"], ["3", "3 bits"], ["4", "4 bits"]]);
  const preset = select([["", "as configured"], ["default", "default"], ["thorough", "thorough"]]);
  const samples = el("input", { type: "number", min: 2, max: 4096, placeholder: "preset" });
  const length = el("input", { type: "number", min: 64, max: 131072, placeholder: "preset" });
  const activate = el("input", { type: "checkbox", checked: true });
  const form = el("form", { class: "card" }, el("h2", {}, "Calibrate"), field("Text to fit on", text), el("div", { class: "grid" }, field("or a file", file), field("Bits", bits), field("Preset", preset), field("Samples", samples), field("Tokens of a sample", length)),
    el("label", {}, activate, " use it for new conversations when it is stored"), el("button", { type: "submit" }, "Calibrate"));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    calm();
    try {
      const body = { activate: activate.checked };
      const given = file.files.length ? await file.files[0].text() : text.value;
      if (given.trim()) body.text = given;
      if (bits.value) body.bits = Number(bits.value);
      if (preset.value) body.preset = preset.value;
      if (samples.value) body.samples = Number(samples.value);
      if (length.value) body.sample_len = Number(length.value);
      await request("POST", "/admin/calibrations", body);
      await refresh(view);
    } catch (error) { complain(error); }
  });
  return form;
}

function watch(view, id) {
  view.following.add(id);
  follow(`/admin/calibrations/${encodeURIComponent(id)}/events`, view.signal, (event, job) => {
    const shown = view.jobs.querySelector(`[data-job="${CSS.escape(id)}"]`);
    if (shown) renew(shown, jobRow(view, job));
    if (job.ended_at) { view.following.delete(id); settle(view, id).catch(complain); }
  });
}

// A stored codec is taken into use after its job's last event.
async function settle(view, id) {
  for (let tries = 0; tries < 60 && !view.signal.aborted; tries += 1) {
    await refresh(view);
    const job = await request("GET", `/admin/calibrations/${encodeURIComponent(id)}`);
    if (job.state !== "stored" || !job.options.activate || job.activated || job.detail.includes("not activated")) break;
    await new Promise((done) => setTimeout(done, 500));
  }
  await refresh(view);
}

function drawJobs(view, jobs) {
  update(view.jobs, el("h2", {}, "Calibrations"), jobs.length ? jobs.slice(0, 10).map((job) => jobRow(view, job)) : el("p", { class: "soft" }, "None since the server started."));
}

function jobRow(view, job) {
  const what = `${job.options.key_bits}/${job.options.value_bits} bits, ${job.options.preset}, ${job.options.num_texts ? `${job.options.num_texts} texts` : "built-in text"}`;
  const running = !job.ended_at;
  return el("div", { "data-key": job.id, "data-job": job.id, "data-state": job.state }, el("p", {}, el("strong", {}, job.state), job.activated ? " and active" : "", el("span", { class: "soft break" }, ` · ${what} · ${job.detail}${job.remaining_s ? ` · ${duration(job.remaining_s)} left` : ""}`)),
    running ? [el("progress", { max: 1, value: job.progress, "aria-label": "Calibration" }), el("button", { type: "button", class: "danger", "data-key": "cancel", onclick: () => request("POST", `/admin/calibrations/${encodeURIComponent(job.id)}/cancel`).then(() => refresh(view)).catch(complain) }, "Cancel calibration")] : null,
    job.report ? el("button", { type: "button", class: "quiet", "data-key": "report", onclick: () => drawReport(view, [{ name: job.artifact_id ?? job.state, report: job.report }]) }, "Report") : null);
}

function drawArtifacts(view, artifacts) {
  view.all = artifacts;
  view.chosen = view.chosen.filter((id) => artifacts.some((one) => one.id === id));
  const rows = artifacts.map((one) => {
    const name = one.id.slice(0, 15);
    const tick = el("input", { type: "checkbox", "aria-label": `Compare ${name}`, value: one.id, disabled: one.damaged, onclick: (event) => choose(view, one.id, event.currentTarget.checked) });
    const path = `/admin/artifacts/${encodeURIComponent(one.id)}`;
    const act = (method, where) => () => request(method, where).then(() => refresh(view)).catch(complain);
    const activate = el("button", { type: "button", class: "quiet", "data-key": "activate", "aria-label": `Activate ${name}`, onclick: act("POST", `${path}/activate`) }, "Activate");
    const actions = one.active ? el("strong", { class: "good" }, "active") : [one.damaged ? null : activate, " ", confirmed("Delete", name, act("DELETE", path))];
    return [tick, el("code", {}, name), one.created_at ? new Date(1000 * one.created_at).toLocaleDateString("en-GB") : "–", one.damaged ? el("span", { class: "bad break" }, one.problem ?? "damaged") : number(one.report?.code_bits_per_channel, 2), number(one.report?.kl_mean, 4), bytes(one.table_bytes), actions,
      one.damaged ? "" : el("button", { type: "button", class: "quiet", "data-key": "report", "aria-label": `Report of ${name}`, onclick: () => drawReport(view, [{ name, report: one.report }]) }, "Report")];
  });
  update(view.artifacts, el("h2", {}, "Stored codecs"), table("Stored codecs", ["compare", "id", "made", "bits", "mean KL", "tables", "", ""], rows, "None yet: the first start of a model fits one.", artifacts.map((one) => one.id)), bitsPlot(artifacts));
}

// Two at most: a third tick takes the place of the first.
function choose(view, id, ticked) {
  view.chosen = ticked ? [...view.chosen, id].slice(-2) : view.chosen.filter((other) => other !== id);
  for (const tick of view.artifacts.querySelectorAll("input[type=checkbox]")) tick.checked = view.chosen.includes(tick.value);
  const chosen = view.chosen.map((one) => view.all.find((artifact) => artifact.id === one));
  if (chosen.length === 2) drawReport(view, chosen.map((one) => ({ name: one.id.slice(0, 15), report: one.report })));
}

// A first press asks, a second one does it. A refresh between the two leaves it as it is.
function confirmed(label, name, act) {
  const button = el("button", { type: "button", class: "danger", "data-key": label, "data-own": true, "aria-label": `${label} ${name}` }, label);
  const say = (sure) => {
    button.dataset.sure = sure;
    button.textContent = sure ? `${label}: sure?` : label;
    button.setAttribute("aria-label", sure ? `${label} ${name}: sure?` : `${label} ${name}`);
  };
  button.onclick = () => {
    if (button.dataset.sure) return act();
    say("yes");
    setTimeout(() => say(""), 4000);
  };
  return button;
}

function bitsPlot(artifacts) {
  const points = artifacts.filter((one) => one.report?.kl_mean !== undefined).map((one) => [one.report.code_bits_per_channel, one.report.kl_mean]);
  return points.length > 1 ? plot("Loss against bits, all stored codecs", "bits per channel", "mean KL", [{ name: "codecs", points }], { scatter: true }) : null;
}

const FIGURES = [["mean KL, nats", (r) => number(r.kl_mean, 5)], ["KL, 99th percentile", (r) => number(r.kl_p99, 4)], ["perplexity change", (r) => `${number(100 * r.ppl_change, 2)} %`], ["same best token", (r) => percent(r.top1)], ["bits per channel, codes", (r) => number(r.code_bits_per_channel, 2)], ["bits per channel, held", (r) => number(r.held_bits_per_channel, 2)], ["tokens evaluated", (r) => number(r.num_tokens)], ["layers packed", (r) => `${r.num_layers_packed} of ${r.num_layers}`]];

function drawReport(view, reports) {
  const rows = FIGURES.map(([name, value]) => [name, ...reports.map(({ report }) => value(report))]);
  const over = reports.map(({ name, report }) => ({ name, points: report.kl_by_position ?? [] }));
  const texts = reports.map(({ name, report }) => ({ name, points: (report.per_text ?? []).map((one, i) => [i + 1, one.kl_mean]) }));
  const plots = [plot("Loss over position", "position", "mean KL", over), plot("Loss by held-out text", "text", "mean KL", texts, { scatter: true }), ...layerPlots(reports)];
  show(view.report, el("div", { class: "card" }, el("h2", {}, reports.length > 1 ? "Two codecs" : "Report"), table("Report", ["", ...reports.map((one) => one.name)], rows, "")), el("div", { class: "grid" }, plots));
  view.report.scrollIntoView({ block: "nearest" });
}

// What each layer loses on its own; codecs stored by earlier versions do not tell.
function layerPlots(reports) {
  const curve = (name, layers, figure) => ({ name, points: layers.map((one) => [one.layer, one[figure]]) });
  const told = reports.filter(({ report }) => report.per_layer?.length);
  if (!told.length) return [];
  if (told.length > 1) return [plot("Error by layer, attention's output", "layer", "relative error", told.map(({ name, report }) => curve(name, report.per_layer, "output_error")))];
  const layers = told[0].report.per_layer;
  return [plot(`Error by layer${reports.length > 1 ? `, ${told[0].name}` : ""}`, "layer", "relative error", [curve("keys", layers, "key_error"), curve("values", layers, "value_error"), curve("attention's output", layers, "output_error")])];
}
