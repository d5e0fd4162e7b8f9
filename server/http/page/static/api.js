// Requests to this server only, with the half of the session that scripts hold.

const TOKEN = "vecinfer-page";

export class NotLoggedIn extends Error {}

export function loggedIn() {
  return localStorage.getItem(TOKEN) !== null;
}

export async function logIn(proof) {
  const answer = await fetch("/page/login", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(proof), credentials: "same-origin",
  });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error.message);
  localStorage.setItem(TOKEN, body.token);
}

export async function logOut() {
  await request("POST", "/page/logout").catch(() => null);
  localStorage.removeItem(TOKEN);
}

export async function send(method, path, body, signal) {
  const headers = { "X-Vecinfer-Page": localStorage.getItem(TOKEN) ?? "", Accept: "application/json" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, {
    method, headers, signal, credentials: "same-origin", body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (answer.status === 401) {
    localStorage.removeItem(TOKEN);
    throw new NotLoggedIn("Log in again: the server was restarted, or the session ended.");
  }
  if (!answer.ok) throw new Error(await errorOf(answer));
  return answer;
}

export async function request(method, path, body, signal) {
  return (await send(method, path, body, signal)).json();
}

async function errorOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `HTTP ${answer.status}`;
  }
}

// Server-sent events of a fetch, which unlike EventSource carries headers; yields {event, data} with data as text.
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      const parts = rest.split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        let event = "message";
        const data = [];
        for (const line of part.split("\n")) {
          if (line.startsWith("event: ")) event = line.slice(7);
          else if (line.startsWith("data: ")) data.push(line.slice(6));
        }
        if (data.length) yield { event, data: data.join("\n") };
      }
    }
  } finally {
    reader.cancel().catch(() => null);
  }
}
