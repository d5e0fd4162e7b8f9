// Codecs: fit one, watch it, read its report, use, compare, delete.
import { request } from "./api.js";
import { bytes, clock, duration, el, field, number, percent, show, table } from "./dom.js";
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
    if (shown) redraw(shown, jobRow(view, job));
    if (job.ended_at) { view.following.delete(id); settle(view, id).catch(complain); }
  });
}

// What is pressed stays the same element while a job runs: a button that is replaced between press and release is not pressed.
function redraw(shown, row) {
  const keeps = shown.querySelector("button.danger") && row.querySelector("button.danger");
  if (!keeps) return shown.replaceWith(row);
  shown.dataset.state = row.dataset.state;
  shown.querySelector("p").replaceWith(row.querySelector("p"));
  shown.querySelector("progress").value = row.querySelector("progress").value;
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
  show(view.jobs, el("h2", {}, "Calibrations"), jobs.length ? jobs.slice(0, 10).map((job) => jobRow(view, job)) : el("p", { class: "soft" }, "None since the server started."));
}

function jobRow(view, job) {
  const what = `${job.options.key_bits}/${job.options.value_bits} bits, ${job.options.preset}, ${job.options.num_texts ? `${job.options.num_texts} texts` : "built-in text"}`;
  const running = !job.ended_at;
  return el("div", { "data-job": job.id, "data-state": job.state }, el("p", {}, el("strong", {}, job.state), job.activated ? " and active" : "", el("span", { class: "soft break" }, ` · ${what} · ${job.detail}${job.remaining_s ? ` · ${duration(job.remaining_s)} left` : ""}`)),
    running ? [el("progress", { max: 1, value: job.progress, "aria-label": "Calibration" }), el("button", { type: "button", class: "danger", onclick: () => request("POST", `/admin/calibrations/${encodeURIComponent(job.id)}/cancel`).then(() => refresh(view)).catch(complain) }, "Cancel calibration")] : null,
    job.report ? el("button", { type: "button", class: "quiet", onclick: () => drawReport(view, [{ name: job.artifact_id ?? job.state, report: job.report }]) }, "Report") : null);
}

function drawArtifacts(view, artifacts) {
  view.all = artifacts;
  const rows = artifacts.map((one) => {
    const name = one.id.slice(0, 15);
    const tick = el("input", { type: "checkbox", "aria-label": `Compare ${name}`, disabled: one.damaged });
    tick.addEventListener("change", () => { view.chosen = tick.checked ? [...view.chosen, one.id].slice(-2) : view.chosen.filter((id) => id !== one.id); compare(view); });
    const act = (label, method, path, css) => el("button", { type: "button", class: css, onclick: () => request(method, path).then(() => refresh(view)).catch(complain) }, label);
    const path = `/admin/artifacts/${encodeURIComponent(one.id)}`;
    const actions = one.active ? el("strong", { class: "good" }, "active") : [one.damaged ? null : act("Activate", "POST", `${path}/activate`, "quiet"), " ", confirmed("Delete", () => request("DELETE", path).then(() => refresh(view)).catch(complain))];
    return [tick, el("code", {}, name), one.created_at ? new Date(1000 * one.created_at).toLocaleDateString("en-GB") : "–", one.damaged ? el("span", { class: "bad break" }, one.reason ?? "damaged") : number(one.report?.code_bits_per_channel, 2), number(one.report?.kl_mean, 4), bytes(one.table_bytes), actions,
      one.damaged ? "" : el("button", { type: "button", class: "quiet", "aria-label": `Report of ${name}`, onclick: () => drawReport(view, [{ name, report: one.report }]) }, "Report")];
  });
  show(view.artifacts, el("h2", {}, "Stored codecs"), table("Stored codecs", ["compare", "id", "made", "bits", "mean KL", "tables", "", ""], rows, "None yet: the first start of a model fits one."), bitsPlot(artifacts));
}

// A first press asks, a second one does it.
function confirmed(label, act) {
  const button = el("button", { type: "button", class: "danger" }, label);
  button.addEventListener("click", () => {
    if (button.dataset.sure) return act();
    button.dataset.sure = "yes";
    button.textContent = `${label}: sure?`;
    setTimeout(() => { delete button.dataset.sure; button.textContent = label; }, 4000);
  });
  return button;
}

function bitsPlot(artifacts) {
  const points = artifacts.filter((one) => one.report?.kl_mean !== undefined).map((one) => [one.report.code_bits_per_channel, one.report.kl_mean]);
  return points.length > 1 ? plot("Loss against bits, all stored codecs", "bits per channel", "mean KL", [{ name: "codecs", points }], { scatter: true }) : null;
}

function compare(view) {
  const chosen = view.chosen.map((id) => view.all.find((one) => one.id === id)).filter(Boolean);
  if (chosen.length === 2) drawReport(view, chosen.map((one) => ({ name: one.id.slice(0, 15), report: one.report })));
}

const FIGURES = [["mean KL, nats", (r) => number(r.kl_mean, 5)], ["KL, 99th percentile", (r) => number(r.kl_p99, 4)], ["perplexity change", (r) => `${number(100 * r.ppl_change, 2)} %`], ["same best token", (r) => percent(r.top1)], ["bits per channel, codes", (r) => number(r.code_bits_per_channel, 2)], ["bits per channel, held", (r) => number(r.held_bits_per_channel, 2)], ["tokens evaluated", (r) => number(r.num_tokens)], ["layers packed", (r) => `${r.num_layers_packed} of ${r.num_layers}`]];

function drawReport(view, reports) {
  const rows = FIGURES.map(([name, value]) => [name, ...reports.map(({ report }) => value(report))]);
  const over = reports.map(({ name, report }) => ({ name, points: report.kl_by_position ?? [] }));
  const texts = reports.map(({ name, report }) => ({ name, points: (report.per_text ?? []).map((one, i) => [i + 1, one.kl_mean]) }));
  show(view.report, el("div", { class: "card" }, el("h2", {}, reports.length > 1 ? "Two codecs" : "Report"), table("Report", ["", ...reports.map((one) => one.name)], rows, "")),
    el("div", { class: "grid" }, plot("Loss over position", "position", "mean KL", over), plot("Loss by held-out text", "text", "mean KL", texts, { scatter: true })));
  view.report.scrollIntoView({ block: "nearest" });
}
