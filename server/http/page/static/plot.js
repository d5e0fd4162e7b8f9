// Small plots as SVG.
import { el, svg } from "./dom.js";

const WIDTH = 320;

export function sparkline(label, ages, values, span, format) {
  const height = 56;
  const top = Math.max(...values, 1e-9);
  const points = values.map((value, i) => `${(WIDTH * (1 - ages[i] / span)).toFixed(1)},${(height - 2 - (height - 6) * value / top).toFixed(1)}`);
  const last = values.length ? format(values.at(-1)) : "–";
  return el("figure", { class: "card" },
    el("figcaption", {}, label, " ", el("strong", {}, last), el("span", { class: "soft" }, ` · highest ${values.length ? format(Math.max(...values)) : "–"}`)),
    svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": `${label}, last 15 minutes, now ${last}` },
      svg("line", { x1: 0, x2: WIDTH, y1: height - 1, y2: height - 1, class: "axis" }),
      points.length > 1 ? svg("polyline", { points: points.join(" "), fill: "none", "stroke-width": 2, class: "stroke0" }) : null));
}

// series: [{name, points: [[x, y], ...]}], at most three; scatter draws dots and no lines.
export function plot(label, xName, yName, series, { scatter = false } = {}) {
  const [left, right, topEdge, bottom, height] = [48, 8, 10, 34, 200];
  const all = series.flatMap((one) => one.points).filter(([x, y]) => Number.isFinite(x) && Number.isFinite(y));
  if (!all.length) return el("p", { class: "soft" }, `${label}: not in this report`);
  const xs = all.map((point) => point[0]);
  const [x0, x1, y1] = [Math.min(...xs), Math.max(...xs), Math.max(...all.map((point) => point[1]), 1e-9)];
  const px = (x) => left + (WIDTH - left - right) * (x1 > x0 ? (x - x0) / (x1 - x0) : 0.5);
  const py = (y) => height - bottom - (height - bottom - topEdge) * y / y1;
  const marks = series.map((one, i) => [
    !scatter && one.points.length > 1 ? svg("polyline", { class: `stroke${i % 3}`, fill: "none", "stroke-width": 2, points: one.points.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join(" ") }) : null,
    one.points.map(([x, y]) => svg("circle", { class: `fill${i % 3}`, cx: px(x), cy: py(y), r: scatter ? 4 : 2 }, svg("title", {}, `${one.name}: ${x}, ${y.toPrecision(3)}`)))]);
  const text = (x, y, words, anchor = "middle") => svg("text", { x, y, "text-anchor": anchor }, words);
  return el("figure", { class: "card" }, el("figcaption", {}, label),
    svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": `${label}: ${all.map(([x, y]) => `${x}: ${y.toPrecision(2)}`).slice(0, 12).join(", ")}` },
      svg("line", { class: "axis", x1: left, x2: left, y1: topEdge, y2: height - bottom }),
      svg("line", { class: "axis", x1: left, x2: WIDTH - right, y1: height - bottom, y2: height - bottom }),
      text(left - 4, topEdge + 6, y1.toPrecision(2), "end"), text(left - 4, height - bottom, "0", "end"),
      text(left, height - 18, String(x0)), text(WIDTH - right - 6, height - 18, String(x1)),
      text((left + WIDTH) / 2, height - 4, `${xName} · upwards: ${yName}`), marks),
    series.length > 1 ? el("ul", { class: "legend" }, series.map((one, i) => el("li", {}, el("i", { class: `c${i % 3}` }), one.name))) : null);
}
