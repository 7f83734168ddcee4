// Values under the pointer (or under the arrow keys). The charts themselves are complete without this.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const AXIS_NAMES = { step: "step", tokens: "tokens", seconds: "time" };

const chosenAxis = (chart) => {
  const input = document.querySelector("input[name=x]:checked");
  const key = input ? input.value : "step";
  return key in chart.x ? key : Object.keys(chart.x)[0];
};
const shown = (run) => {
  const box = document.getElementById("run-" + run);
  return !box || box.checked;
};
const words = (value, unit) => {
  if (unit === "%") return (100 * value).toFixed(2) + " %";
  const digits = Math.abs(value) >= 1e5 ? 6 : 4;
  return Number(value.toPrecision(digits)).toLocaleString("en", { maximumSignificantDigits: digits }) + (unit ? " " + unit : "");
};
const time = (seconds) => {
  const s = Math.round(seconds), pad = (n) => String(n).padStart(2, "0");
  if (s < 60) return s + " s";
  return s < 3600 ? `${Math.floor(s / 60)} min ${pad(s % 60)} s` : `${Math.floor(s / 3600)} h ${pad(Math.floor(s / 60) % 60)} min`;
};

function nearest(places, target) {
  let best = -1;
  for (let i = 0; i < places.length; i++) {
    if (places[i] === null) continue;
    if (best < 0 || Math.abs(places[i] - target) < Math.abs(places[best] - target)) best = i;
  }
  return best;
}

function make(name, attributes) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function enliven(figure) {
  const svg = figure.querySelector("svg");
  const chart = JSON.parse(figure.querySelector("script").textContent);
  const [left, top, right, bottom] = chart.box;
  const [low, high, log] = chart.y;
  const marks = svg.appendChild(make("g", { "aria-hidden": "true" }));
  const tip = figure.appendChild(document.createElement("div"));
  tip.className = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  let at = null; // where the arrow keys stand, in units of the x-axis

  const toX = (value, axis) => left + (right - left) * value / chart.x[axis][0];
  const toY = (value) => {
    const f = log ? Math.log : (v) => v;
    return Math.min(Math.max(top + (bottom - top) * (f(high) - f(value)) / (f(high) - f(low)), top), bottom);
  };

  function hide() {
    tip.hidden = true;
    marks.replaceChildren();
  }

  function show(value) {
    const axis = chosenAxis(chart);
    const found = chart.runs
      .filter((series) => shown(series.run))
      .map((series) => ({ series, i: nearest(series[axis], value) }))
      .filter(({ i }) => i >= 0);
    if (!found.length) return hide();
    const distance = ({ series, i }) => Math.abs(series[axis][i] - value);
    const closest = found.reduce((a, b) => (distance(b) < distance(a) ? b : a));
    at = closest.series[axis][closest.i];
    const x = toX(at, axis);
    marks.replaceChildren(make("path", { class: "guide", d: `M${x} ${top}V${bottom}` }));
    const heading = document.createElement("div");
    heading.textContent = AXIS_NAMES[axis] + " " + (axis === "seconds" ? time(at) : at.toLocaleString("en"));
    tip.replaceChildren(heading);
    for (const { series, i } of found) {
      const last = Math.max(...series[axis].filter((v) => v !== null));
      if (at > last * 1.02) continue; // this run had ended
      const colour = "c" + (series.run % 8);
      marks.append(make("circle", { class: "at " + colour, r: 4.5, cx: toX(series[axis][i], axis), cy: toY(series.value[i]) }));
      const line = document.createElement("div"), chip = document.createElement("span"), number = document.createElement("b");
      chip.className = "chip " + colour;
      number.textContent = words(series.value[i], chart.unit);
      line.append(chip, number, chart.runs.length > 1 ? " " + series.name : "");
      tip.append(line);
    }
    tip.hidden = false;
    const scale = svg.clientWidth / svg.viewBox.baseVal.width;
    const onRight = x > (left + right) / 2;
    const px = svg.offsetLeft || svg.getBoundingClientRect().left - figure.getBoundingClientRect().left;
    tip.style.left = onRight ? "auto" : px + x * scale + 14 + "px";
    tip.style.right = onRight ? figure.clientWidth - px - x * scale + 14 + "px" : "auto";
    tip.style.top = svg.getBoundingClientRect().top - figure.getBoundingClientRect().top + top * scale + 6 + "px";
  }

  svg.addEventListener("pointermove", (event) => {
    const bounds = svg.getBoundingClientRect();
    const x = (event.clientX - bounds.left) / bounds.width * svg.viewBox.baseVal.width;
    const share = Math.min(Math.max((x - left) / (right - left), 0), 1);
    show(share * chart.x[chosenAxis(chart)][0]);
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") hide();
    if (!move) return;
    event.preventDefault();
    const series = chart.runs.find((s) => shown(s.run));
    if (!series) return;
    const places = series[chosenAxis(chart)];
    const i = at === null ? (move > 0 ? 0 : places.length - 1) : nearest(places, at) + move;
    show(places[Math.min(Math.max(i, 0), places.length - 1)] ?? 0);
  });
  for (const input of document.querySelectorAll(".toolbar input")) input.addEventListener("change", () => { at = null; hide(); });
}

document.querySelectorAll("figure.chart").forEach(enliven);
