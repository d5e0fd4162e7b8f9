// A chat over /v1/chat/completions: streamed, stopped, asked again. It lives in this tab only, and goes on while
// another view is looked at.
import { events, send } from "./api.js";
import { el, field, number, show, update } from "./dom.js";
import { calm, complain } from "./notice.js";
import { markdown } from "./markdown.js";

const state = { messages: [], system: "", temperature: "", top_p: "", max_tokens: "", stopping: null, view: null };

export async function open(main) {
  state.view ??= make();
  show(main, el("h1", {}, "Chat"), ...state.view.parts);
  state.view.log.lastElementChild?.scrollIntoView({ block: "end" });
  state.view.text.focus();
}

function make() {
  const log = el("div", { role: "log", "aria-label": "Conversation", "aria-live": "off" });
  const text = el("textarea", { rows: 3, placeholder: "Ask something", "aria-label": "Your message" });
  const button = (label, css, onclick) => el("button", { type: onclick ? "button" : "submit", class: css, onclick }, label);
  const view = { log, text };
  view.buttons = {
    send: button("Send", null, null), stop: button("Stop", "danger", () => state.stopping?.abort()),
    again: button("Regenerate", "quiet", () => regenerate(view)), fresh: button("New chat", "quiet", () => forget(view)),
  };
  const composer = el("form", { class: "composer" }, text, el("div", { class: "buttons" }, Object.values(view.buttons)));
  composer.addEventListener("submit", (event) => {
    event.preventDefault();
    const content = text.value.trim();
    if (!content || state.stopping) return;
    add(view, { role: "user", content });
    text.value = "";
    answer(view).catch(complain);
  });
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); composer.requestSubmit(); }
  });
  view.parts = [parameters(), log, composer];
  setBusy(view, false);
  return view;
}

function regenerate(view) {
  while (state.messages.at(-1)?.role === "assistant") { state.messages.pop(); view.log.lastElementChild.remove(); }
  if (state.messages.length) answer(view).catch(complain);
}

function forget(view) {
  state.stopping?.abort();
  state.messages = [];
  show(view.log);
  view.text.focus();
}

function parameters() {
  const control = (name, label, extra) => {
    const input = el("input", { type: "number", value: state[name], ...extra });
    input.addEventListener("change", () => { state[name] = input.value; });
    return field(label, input);
  };
  const system = el("textarea", { rows: 2 });
  system.value = state.system;
  system.addEventListener("change", () => { state.system = system.value; });
  return el("details", { class: "card" }, el("summary", {}, "Parameters"),
    field("System message", system),
    el("div", { class: "grid" }, control("temperature", "temperature (0 is greedy)", { min: 0, max: 2, step: 0.1 }), control("top_p", "top_p", { min: 0, max: 1, step: 0.05 }), control("max_tokens", "max_tokens", { min: 1, step: 1 })));
}

function add(view, message) {
  state.messages.push(message);
  const shown = bubble(message);
  view.log.append(shown);
  shown.scrollIntoView({ block: "nearest" });
  return shown;
}

function bubble(message) {
  const shown = el("article", { class: `message ${message.role}` });
  draw(shown, message);
  return shown;
}

function draw(shown, message) {
  update(shown, el("h2", {}, message.role === "user" ? "You" : "Model"),
    message.reasoning ? el("details", { "data-key": "reasoning" }, el("summary", {}, "Reasoning"), el("div", { class: "reasoning" }, message.reasoning)) : null,
    message.role === "user" ? el("p", {}, message.content) : markdown(message.content),
    message.note ? el("p", { class: "soft" }, message.note) : null, message.usage ? cached(message.usage) : null);
}

// Which part of the prompt was held already, which was read, and what was written.
function cached(usage) {
  const held = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const parts = [["c1", held, "from the cache"], ["c0", usage.prompt_tokens - held, "read"], ["c2", usage.completion_tokens, "written"]];
  const words = parts.map(([, count, name]) => `${number(count)} ${name}`).join(", ");
  const bar = el("div", { class: "cachebar", role: "img", "aria-label": `Tokens: ${words}` });
  for (const [colour, count] of parts) {
    const part = el("span", { class: colour });
    part.style.flexGrow = String(count);
    bar.append(part);
  }
  return [bar, el("ul", { class: "legend" }, parts.map(([colour, count, name]) => el("li", {}, el("i", { class: colour }), `${number(count)} tokens ${name}`)))];
}

// Who pressed a button that can be pressed no longer goes on with what comes next.
function setBusy(view, busy) {
  const focused = document.activeElement;
  view.buttons.send.disabled = view.buttons.again.disabled = busy;
  view.buttons.stop.disabled = !busy;
  if (Object.values(view.buttons).includes(focused) && focused.disabled) (busy ? view.buttons.stop : view.text).focus();
}

async function answer(view) {
  calm();
  const message = { role: "assistant", content: "" };
  const body = { messages: asked(), stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "max_tokens"]) if (state[name] !== "") body[name] = Number(state[name]);
  const shown = add(view, message);
  const stopping = state.stopping = new AbortController();
  setBusy(view, true);
  let due = 0;
  const redraw = () => { if (!due) due = requestAnimationFrame(() => { due = 0; following(shown, () => draw(shown, message)); }); };
  try {
    for await (const { data } of events(await send("POST", "/v1/chat/completions", body, stopping.signal))) {
      if (data === "[DONE]") break;
      take(message, JSON.parse(data));
      redraw();
    }
  } catch (error) {
    message.note = error.name === "AbortError" ? "Stopped." : `Ended: ${error.message}`;
    if (error.name !== "AbortError") complain(error);
  } finally {
    if (state.stopping === stopping) state.stopping = null;
    cancelAnimationFrame(due);
    following(shown, () => draw(shown, message));
    setBusy(view, state.stopping !== null);
  }
}

// Whoever reads the end goes on reading it; who has scrolled elsewhere stays there.
function following(shown, change) {
  const page = document.documentElement;
  const atEnd = page.scrollHeight - page.clientHeight - page.scrollTop < 40;
  change();
  if (atEnd && shown.isConnected) page.scrollTop = page.scrollHeight;
}

function asked() {
  const messages = state.messages.map(({ role, content }) => ({ role, content }));
  return state.system.trim() ? [{ role: "system", content: state.system }, ...messages] : messages;
}

function take(message, chunk) {
  if (chunk.error) throw new Error(chunk.error.message);
  if (chunk.usage) message.usage = chunk.usage;
  const delta = chunk.choices?.[0]?.delta ?? {};
  message.content += delta.content ?? "";
  const thought = delta.reasoning_content ?? delta.reasoning ?? "";
  if (thought) message.reasoning = (message.reasoning ?? "") + thought;
  if (chunk.choices?.[0]?.finish_reason === "length") message.note = "Ended at max_tokens.";
}
