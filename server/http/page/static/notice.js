// What went wrong, told in one place, and streams that connect again.
import { events, NotLoggedIn, send } from "./api.js";

const notice = document.getElementById("notice");
let askForKey = () => {};

export function onLogin(ask) {
  askForKey = ask;
}

export function complain(error) {
  if (error?.name === "AbortError") return;
  if (error instanceof NotLoggedIn) return askForKey(error.message);
  notice.textContent = error instanceof TypeError ? "The server does not answer." : String(error?.message ?? error);
  notice.hidden = false;
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
      if (signal.aborted || path !== "/admin/live") return;
      complain(new TypeError("the stream ended"));
    } catch (error) {
      if (signal.aborted) return;
      complain(error);
      if (!(error instanceof TypeError)) return;
    }
    await new Promise((done) => setTimeout(done, 2000));
  }
}
