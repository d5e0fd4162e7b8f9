// Which view is shown, logging in, and light or dark.
import { events, logIn, logOut, loggedIn, NotLoggedIn, send } from "./api.js";
import { el, field, show } from "./dom.js";

const VIEWS = ["now", "chat", "codecs", "health"];
const main = document.getElementById("main");
const notice = document.getElementById("notice");
let leave = null;

export function complain(error) {
  if (error?.name === "AbortError") return;
  if (error instanceof NotLoggedIn) showLogin(error.message);
  else {
    notice.textContent = error instanceof TypeError ? "The server does not answer." : String(error?.message ?? error);
    notice.hidden = false;
  }
}

export function calm() {
  notice.hidden = true;
}

// Calls `take(name, data)` for the events of a GET route until `signal` aborts; connects again after a break.
export async function follow(path, signal, take) {
  while (!signal.aborted) {
    try {
      const answer = await send("GET", path, undefined, signal);
      calm();
      for await (const { event, data } of events(answer)) take(event, JSON.parse(data));
      return;
    } catch (error) {
      if (signal.aborted) return;
      complain(error);
      if (!(error instanceof TypeError)) return;
      await new Promise((done) => setTimeout(done, 2000));
    }
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.getElementById("theme").textContent = theme === "dark" ? "Light" : "Dark";
}

function showLogin(message) {
  leave?.abort();
  document.getElementById("logout").hidden = true;
  for (const link of document.querySelectorAll("nav a")) link.removeAttribute("aria-current");
  const key = el("input", { type: "password", autocomplete: "current-password", required: true, name: "key" });
  const form = el("form", { class: "card login" },
    el("h1", {}, "Log in"),
    el("p", { class: "soft" }, "On the server's machine ", el("code", {}, "vecinfer open"), " does it for you. Elsewhere type the admin key: it lies in ", el("code", {}, "admin_key"), " in the server's data folder."),
    field("Admin key", key), el("button", { type: "submit" }, "Log in"), el("p", { role: "status", class: "bad" }, message ?? ""));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("button");
    button.disabled = true;
    try {
      await logIn({ key: key.value });
      calm();
      await route();
    } catch (error) {
      form.querySelector("[role=status]").textContent = error.message;
      button.disabled = false;
      key.select();
    }
  });
  show(main, form);
  key.focus();
}

async function route() {
  const hash = location.hash.slice(1);
  if (hash.startsWith("link=")) {
    // What was followed must not stay in the address or the history.
    history.replaceState(null, "", "/");
    try {
      await logIn({ link: hash.slice(5) });
    } catch (error) {
      if (!loggedIn()) return showLogin(error.message);
    }
  }
  if (!loggedIn()) return showLogin("");
  const name = VIEWS.includes(hash) ? hash : "now";
  leave?.abort();
  leave = new AbortController();
  calm();
  document.getElementById("logout").hidden = false;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const { open } = await import(`./${name}.js`);
  document.title = `${name[0].toUpperCase()}${name.slice(1)} – vecinfer`;
  try {
    await open(main, leave.signal);
  } catch (error) {
    complain(error);
  }
}

setTheme(localStorage.getItem("vecinfer-theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("vecinfer-theme", theme);
  setTheme(theme);
});
document.getElementById("logout").addEventListener("click", async () => {
  await logOut();
  showLogin("");
});
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
addEventListener("hashchange", route);
await route();
