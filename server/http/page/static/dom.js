// Elements from data: text is always a text node, so nothing that comes from elsewhere is ever read as markup.

export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...nodes(children));
  return element;
}

function nodes(children) {
  return children.flat(9).filter((child) => child !== null && child !== undefined).map((child) => (child instanceof Node ? child : document.createTextNode(String(child))));
}

export function show(parent, ...children) {
  parent.replaceChildren(...nodes(children));
}

// Shows the same as `show`, and keeps every element that is there already: what a reader presses, has focused, marked or
// scrolled stays. Children with a data-key are the same one only under the same key; others by their place.
export function update(parent, ...children) {
  const fresh = nodes(children);
  const wanted = new Set(fresh.map(keyOf).filter(Boolean));
  const held = new Map([...parent.childNodes].filter(keyOf).map((child) => [keyOf(child), child]));
  let at = parent.firstChild;
  const drop = () => { const gone = at; at = at.nextSibling; gone.remove(); };
  for (const child of fresh) {
    while (at && keyOf(at) && !wanted.has(keyOf(at))) drop();
    const kept = keyOf(child) ? held.get(keyOf(child)) : at;
    if (!kept || !alike(kept, child)) {
      parent.insertBefore(child, at);
      if (at && !keyOf(at) && !keyOf(child)) drop();
    } else {
      if (kept === at) at = at.nextSibling;
      else parent.insertBefore(kept, at);
      renew(kept, child);
    }
  }
  while (at) drop();
}

function keyOf(child) {
  return child.dataset?.key;
}

function alike(kept, fresh) {
  return kept.nodeName === fresh.nodeName && keyOf(kept) === keyOf(fresh);
}

// Makes `kept` what `fresh` is. Whether it is open, ticked or typed into is the reader's; what has data-own keeps itself.
// A handler comes from `fresh` to `kept`: it finds its element as event.currentTarget.
export function renew(kept, fresh) {
  if (kept.nodeType === Node.TEXT_NODE) {
    if (kept.data !== fresh.data) kept.data = fresh.data;
    return;
  }
  if (kept.hasAttribute("data-own")) return;
  for (const { name } of [...kept.attributes]) if (name !== "open" && !fresh.hasAttribute(name)) kept.removeAttribute(name);
  for (const { name, value } of fresh.attributes) {
    if (name === "open" || kept.getAttribute(name) === value) continue;
    // The policy forbids an attribute `style`, not what a script sets.
    if (name === "style") kept.style.cssText = fresh.style.cssText;
    else kept.setAttribute(name, value);
  }
  kept.onclick = fresh.onclick;
  update(kept, ...fresh.childNodes);
}

export function bytes(count) {
  if (count === null || count === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (count >= 1024 && at < units.length - 1) { count /= 1024; at += 1; }
  return `${at && count < 100 ? count.toFixed(1) : Math.round(count)} ${units[at]}`;
}

export function number(value, digits = 0) {
  if (value === null || value === undefined) return "–";
  return value.toLocaleString("en", { maximumFractionDigits: digits });
}

export function percent(share) {
  return share === null || share === undefined ? "–" : `${Math.round(100 * share)} %`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

export function clock(epoch) {
  return new Date(1000 * epoch).toLocaleTimeString("en-GB");
}

// keys: of the rows, by which `update` knows them again.
export function table(caption, heads, rows, empty, keys = []) {
  if (!rows.length) return el("p", { class: "soft" }, empty);
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el("table", {},
      el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))),
      el("tbody", {}, rows.map((row, i) => el("tr", { "data-key": keys[i] }, row.map((cell) => el("td", {}, cell)))))));
}

export function field(label, control) {
  return el("label", {}, el("span", {}, label), control);
}
