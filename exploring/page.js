"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const text = document.getElementById("text"), panel = document.getElementById("move");
const COLUMNS = [["student", "π", 1], ["critic", "critic", 2], ["reality", "reality", 3], ["consensus", "consensus", 4], ["reward", "reward", 5]];  // name, heading, place in a row
const BY = { s: "student", c: "critic", sc: "both", "": "" };
let chosen = -1;

const shown = (token) => data.texts[token];
const visible = (token) => shown(token).replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣") || "∅";
const goldRow = (move) => move[4].find((row) => row[0] === move[0]);
const surprise = (p) => -Math.log(Math.max(p, 1e-9));
const percent = (p) => (p >= 0.9995 ? "100 %" : (100 * p).toPrecision(p < 0.001 ? 1 : p < 0.1 ? 2 : 3) + " %");

function colour(move, mode) {
  const row = goldRow(move), student = surprise(row[1]);
  if (mode === "student") return `rgba(var(--warm), ${Math.min(0.85, student / 7)})`;
  const critic = surprise(row[2]);
  if (mode === "critic") return `rgba(var(--warm), ${Math.min(0.85, critic / 7)})`;
  const ahead = critic - student;
  return `rgba(var(${ahead > 0 ? "--cool" : "--warm"}), ${Math.min(0.85, Math.abs(ahead) / 4)})`;
}

function paint() {
  const mode = document.querySelector("input[name=mode]:checked").value;
  for (const span of text.children) {
    const move = data.moves[span.dataset.at];
    if (move) span.style.background = colour(move, mode);
  }
}

function cell(kind, value, most) {
  const td = document.createElement("td");
  td.className = "bar";
  if (value === null) return td;
  const bar = document.createElement("i"), number = document.createElement("b");
  bar.style.width = `${most > 0 ? (100 * value) / most : 0}%`;
  bar.style.setProperty("--c", `var(--${kind})`);
  number.textContent = kind === "reward" ? value.toPrecision(2) : percent(value);
  td.append(bar, number);
  return td;
}

function plain(tag, words) {
  const element = document.createElement(tag);
  element.textContent = words;
  return element;
}

function show(at) {
  const move = data.moves[at];
  if (!move) return;
  if (chosen >= 0) text.children[chosen + 1].setAttribute("aria-selected", "false");
  chosen = at;
  const span = text.children[at + 1];
  span.setAttribute("aria-selected", "true");
  text.setAttribute("aria-activedescendant", span.id);
  span.scrollIntoView({ block: "nearest" });
  const [gold, rank, entropy, count, rows] = move, row = goldRow(move);
  const columns = COLUMNS.filter(([, , i]) => rows.some((r) => r[i] !== null));
  const most = columns.map(([kind, , i]) => Math.max(...rows.map((r) => r[i] ?? 0), kind === "reward" ? 0 : 1));
  const head = plain("h2", "");
  head.append("next: ", plain("code", visible(gold)));
  const facts = plain("p", `π(gold) ${percent(row[1])}, rank ${rank.toLocaleString()}; entropy ${entropy.toFixed(2)} nats; ` +
    `${count} actions${rows.length < count ? `, ${rows.length} shown` : ""}`);
  const table = document.createElement("table"), top = table.createTHead().insertRow(), body = table.createTBody();
  top.append(plain("th", "action"), plain("th", "proposed by"), ...columns.map(([, name]) => plain("th", name)));
  for (const r of rows) {
    const line = body.insertRow(), name = document.createElement("td");
    if (r[0] === gold) line.className = "gold";
    name.append(plain("code", visible(r[0])), r[0] === gold ? " gold" : "");
    line.append(name, plain("td", BY[r[6]]));
    columns.forEach(([kind, , i], c) => line.append(cell(kind, r[i], most[c])));
  }
  panel.replaceChildren(head, facts, table);
}

function add(token, at) {
  const span = plain("span", shown(token));
  span.id = `t${at}`;
  span.dataset.at = at;
  span.setAttribute("role", "option");
  if (at >= 0) span.setAttribute("aria-selected", "false");
  if (shown(token).startsWith("\n")) { span.className = "space"; span.dataset.mark = "⏎"; }
  text.append(span);
}

add(data.first, -1);
data.moves.forEach((move, at) => add(move[0], at));
text.addEventListener("click", (event) => { if (event.target.dataset.at >= 0) show(+event.target.dataset.at); });
text.addEventListener("keydown", (event) => {
  const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
  if (!by) return;
  event.preventDefault();
  show(Math.min(data.moves.length - 1, Math.max(0, chosen + by)));
});
document.querySelectorAll("input[name=mode]").forEach((input) => input.addEventListener("change", paint));
paint();
show(0);
