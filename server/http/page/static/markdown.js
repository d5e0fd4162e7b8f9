// A safe part of Markdown as DOM nodes: headings, paragraphs, lists, quotes, tables, code, emphasis, links.
// Whatever else stands in a text, HTML and images included, is shown as it was written.
import { el } from "./dom.js";

const FENCE = /^\s{0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const INLINE = /(`+)([\s\S]+?)\1|\*\*(?=\S)([\s\S]+?)\*\*|__(?=\S)([\s\S]+?)__|\*(?=\S)([^*\n]+?)\*|(?<!!)\[([^\]\n]{1,500})\]\((https?:\/\/[^\s)]{1,2000})\)/;

export function markdown(text) {
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    const [block, next] = blockAt(lines, at);
    if (block) blocks.push(block);
    at = next;
  }
  return blocks;
}

function blockAt(lines, at) {
  const line = lines[at];
  if (!line.trim()) return [null, at + 1];
  const fence = FENCE.exec(line);
  if (fence) return codeAt(lines, at, fence);
  const heading = /^(#{1,6})\s+(.*)$/.exec(line);
  // The page has its own first two levels.
  if (heading) return [el(`h${Math.min(6, heading[1].length + 2)}`, {}, inline(heading[2])), at + 1];
  if (/^\s{0,3}([-*_])(\s*\1){2,}\s*$/.test(line)) return [el("hr"), at + 1];
  if (/^\s{0,3}>/.test(line)) return quoteAt(lines, at);
  if (ITEM.test(line)) return listAt(lines, at);
  if (line.includes("|") && /^\s*\|?[\s:|-]+\|[\s:|-]*$/.test(lines[at + 1] ?? "")) return tableAt(lines, at);
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !FENCE.test(lines[end]) && !ITEM.test(lines[end]) && !/^(#{1,6}\s|\s{0,3}>)/.test(lines[end])) end += 1;
  return [el("p", {}, inline(lines.slice(at, end).join("\n"))), end];
}

function codeAt(lines, at, fence) {
  let end = at + 1;
  while (end < lines.length && !lines[end].trim().startsWith(fence[1])) end += 1;
  const code = el("code", {}, lines.slice(at + 1, end).join("\n"));
  return [el("pre", { tabindex: "0", role: "region", "aria-label": fence[2] ? `Code, ${fence[2]}` : "Code" }, code), end + 1];
}

function quoteAt(lines, at) {
  let end = at;
  const inside = [];
  while (end < lines.length && /^\s{0,3}>/.test(lines[end])) { inside.push(lines[end].replace(/^\s{0,3}>\s?/, "")); end += 1; }
  // Depth is bounded: quotes in quotes are text.
  return [el("blockquote", {}, el("p", {}, inline(inside.join("\n")))), end];
}

function listAt(lines, at) {
  const ordered = /\d/.test(ITEM.exec(lines[at])[2]);
  const list = el(ordered ? "ol" : "ul", ordered ? { start: parseInt(ITEM.exec(lines[at])[2], 10) } : {});
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    if (!item) break;
    let more = end + 1;
    while (more < lines.length && lines[more].trim() && !ITEM.test(lines[more]) && /^\s/.test(lines[more])) more += 1;
    const depth = Math.min(5, Math.floor(item[1].length / 2));
    const own = el("li", {}, inline([item[3], ...lines.slice(end + 1, more).map((line) => line.trim())].join("\n")));
    let target = list;
    for (let level = 0; level < depth && target.lastElementChild; level += 1) {
      let inner = target.lastElementChild.querySelector(":scope > ul, :scope > ol");
      if (!inner) { inner = el(/\d/.test(item[2]) ? "ol" : "ul"); target.lastElementChild.append(inner); }
      target = inner;
    }
    target.append(own);
    end = more;
  }
  return [list, end];
}

function tableAt(lines, at) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|") && lines[end].trim()) end += 1;
  const rows = lines.slice(at + 2, end).map((line) => el("tr", {}, cells(line).map((cell) => el("td", {}, inline(cell)))));
  const head = el("thead", {}, el("tr", {}, cells(lines[at]).map((cell) => el("th", { scope: "col" }, inline(cell)))));
  return [el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table" }, el("table", {}, head, el("tbody", {}, rows))), end];
}

function inline(text, depth = 0) {
  const nodes = [];
  let rest = text;
  while (rest) {
    const found = depth < 6 ? INLINE.exec(rest) : null;
    if (!found) { nodes.push(rest); break; }
    if (found.index) nodes.push(rest.slice(0, found.index));
    nodes.push(spanOf(found, depth));
    rest = rest.slice(found.index + found[0].length);
  }
  return nodes;
}

function spanOf(found, depth) {
  if (found[2] !== undefined) return el("code", {}, found[2].trim());
  const strong = found[3] ?? found[4];
  if (strong !== undefined) return el("strong", {}, inline(strong, depth + 1));
  if (found[5] !== undefined) return el("em", {}, inline(found[5], depth + 1));
  return el("a", { href: found[7], rel: "noopener noreferrer nofollow", target: "_blank" }, found[6]);
}
