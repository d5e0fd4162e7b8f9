// Which view is shown, logging in, and light or dark.
import { logIn, logOut, loggedIn } from "./api.js";
import { el, field, show } from "./dom.js";
import { calm, complain, onLogin } from "./notice.js";

const VIEWS = ["now", "chat", "codecs", "health"];
const main = document.getElementById("main");
let leave = null;

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
  const mine = leave = new AbortController();
  calm();
  document.getElementById("logout").hidden = false;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const { open } = await import(`./${name}.js`);
  if (mine.signal.aborted) return;
  document.title = `${name[0].toUpperCase()}${name.slice(1)} – vecinfer`;
  try {
    await open(main, mine.signal);
  } catch (error) {
    if (!mine.signal.aborted) complain(error);
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
  // A new page: nothing of this one, its chat neither, is left for whoever comes next.
  location.reload();
});
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
addEventListener("hashchange", route);
onLogin(showLogin);
route();
