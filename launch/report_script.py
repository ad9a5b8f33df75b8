"""The script of a report's page: hover, zoom, legends, and the start of all videos. It asks for nothing and runs no text."""

from __future__ import annotations

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg", SIDE = 10000, end = Math.max(data.last_step, 1);
const tip = document.body.appendChild(make("div", "tip")), reset = document.getElementById("reset");
let view = [0, end];

function make(name, kind) {
  const made = document.createElement(name);
  made.className = kind;
  return made;
}

function drawn(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  return made;
}

function ticks(low, high, least) {
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(least, [1, 2, 5, 10].map(f => f * power).find(s => s >= rough * (1 - 1e-9)));
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n <= high / step + 1e-9; n++) found.push(n * step);
  return found;
}

function short(value, digits) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e6 || size < 1e-4 ? value.toExponential(2) : String(Number(value.toPrecision(digits)));
}

function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle; else high = middle;
  }
  return step - steps[low] < steps[high] - step ? low : high;
}

class Chart {
  constructor(figure) {
    this.figure = figure;
    this.data = data.charts[Number(figure.dataset.chart)];
    this.svg = figure.querySelector(":scope > svg");
    this.plot = this.svg.querySelector(".plot");
    this.axes = this.svg.querySelector(".axes");
    this.hair = this.svg.appendChild(drawn("line", {class: "hair", visibility: "hidden"}));
    this.chosen = this.svg.appendChild(drawn("rect", {class: "chosen", visibility: "hidden"}));
    this.hidden = new Set();
    this.from = null;
    for (const button of figure.querySelectorAll(".legend button"))
      button.addEventListener("click", () => this.toggle(button));
    this.svg.addEventListener("pointermove", event => this.move(event));
    this.svg.addEventListener("pointerdown", event => this.down(event));
    this.svg.addEventListener("pointerup", event => this.up(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("dblclick", () => look([0, end]));
    this.draw();
  }

  get box() {
    const [width, height] = this.data.size, [left, top, right, bottom] = this.data.plot;
    return {left, top, right: width - right, foot: height - bottom, wide: width - left - right,
            high: height - top - bottom};
  }

  toggle(button) {
    const number = Number(button.dataset.line);
    if (!this.hidden.delete(number)) this.hidden.add(number);
    button.setAttribute("aria-pressed", String(!this.hidden.has(number)));
    this.plot.querySelector(`[data-line="${number}"]`).classList.toggle("gone", this.hidden.has(number));
    this.draw();
  }

  bounds() {
    if (view[0] === 0 && view[1] === end && !this.hidden.size) return this.data.bounds;
    let low = Infinity, high = -Infinity;
    this.data.lines.forEach((line, number) => {
      if (this.hidden.has(number)) return;
      line.steps.forEach((step, i) => {
        if (step < view[0] || step > view[1]) return;
        low = Math.min(low, (line.low || line.mean)[i]);
        high = Math.max(high, (line.high || line.mean)[i]);
      });
    });
    if (low > high) return this.data.bounds;
    if (this.data.log) [low, high] = [Math.log10(low), Math.log10(high)];
    const room = high > low ? 0.06 * (high - low) : 0.1 * Math.abs(high) || 1;
    return [low - room, high + room];
  }

  draw() {
    const box = this.box, [low, high] = this.shown = this.bounds(), [a, b] = this.data.bounds;
    const x = SIDE * view[0] / end, y = SIDE * (b - high) / (b - a);
    this.plot.setAttribute("viewBox", [x, y, SIDE * (view[1] - view[0]) / end, SIDE * (high - low) / (b - a)].join(" "));
    this.axes.replaceChildren();
    for (const value of ticks(low, high, this.data.log && high - low > 1 ? 1 : 0)) {
      const at = box.foot - box.high * (value - low) / (high - low);
      this.axes.append(drawn("line", {class: "grid", x1: box.left, x2: box.right, y1: at, y2: at}));
      this.axes.append(drawn("text", {class: "mark", x: box.left - 8, y: at + 4, "text-anchor": "end"},
        this.written(this.data.log ? 10 ** value : value, this.data.log ? 3 : 5)));
    }
    for (const step of ticks(view[0], view[1], 1)) {
      const at = box.left + box.wide * (step - view[0]) / (view[1] - view[0]);
      const anchor = at > this.data.size[0] - this.data.edge ? "end" : "middle";
      this.axes.append(drawn("text", {class: "mark", x: at, y: box.foot + 18, "text-anchor": anchor}, String(step)));
    }
  }

  written(value, digits) {
    return short(value, digits) + (this.data.unit ? " " + this.data.unit : "");
  }

  at(event) {
    const frame = this.svg.getBoundingClientRect(), box = this.box;
    const x = (event.clientX - frame.left) * this.data.size[0] / frame.width;
    return Math.min(Math.max(x, box.left), box.right);
  }

  step(x) {
    return view[0] + (view[1] - view[0]) * (x - this.box.left) / this.box.wide;
  }

  move(event) {
    const x = this.at(event), box = this.box;
    if (this.from !== null) {
      const [left, right] = [Math.min(x, this.from), Math.max(x, this.from)];
      for (const [key, value] of Object.entries({x: left, width: right - left, y: box.top, height: box.high,
                                                 visibility: "visible"})) this.chosen.setAttribute(key, value);
    }
    for (const [key, value] of Object.entries({x1: x, x2: x, y1: box.top, y2: box.foot, visibility: "visible"}))
      this.hair.setAttribute(key, value);
    this.tell(event, this.step(x));
  }

  tell(event, wanted) {
    tip.replaceChildren();
    this.data.lines.forEach((line, number) => {
      if (this.hidden.has(number)) return;
      const i = nearest(line.steps, wanted), row = tip.appendChild(make("div", "row"));
      const own = this.figure.querySelector(`.plot [data-line="${number}"]`).classList;
      row.appendChild(make("i", own.value));
      row.append(`${line.label} `);
      row.appendChild(make("b", "")).textContent = this.written(line.mean[i], 6);
      if (line.low) row.append(` (${short(line.low[i], 5)} to ${short(line.high[i], 5)})`);
      if (line.running) row.append(`, running mean ${short(line.running[i], 5)}`);
      row.append(` at step ${Math.round(line.steps[i])}`);
    });
    tip.style.display = "block";
    const room = document.documentElement.clientWidth - tip.offsetWidth - 12;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 16, room)) + scrollX}px`;
    tip.style.top = `${event.clientY + 18 + scrollY}px`;
  }

  down(event) {
    if (event.pointerType === "touch") return;
    this.from = this.at(event);
    this.svg.setPointerCapture(event.pointerId);
    event.preventDefault();
  }

  up(event) {
    if (this.from === null) return;
    const x = this.at(event), pair = [Math.min(x, this.from), Math.max(x, this.from)];
    this.from = null;
    this.chosen.setAttribute("visibility", "hidden");
    if (pair[1] - pair[0] > 6) look(pair.map(each => this.step(each)));
  }

  leave() {
    tip.style.display = "none";
    this.hair.setAttribute("visibility", "hidden");
  }
}

function look(range) {
  view = range;
  reset.hidden = range[0] === 0 && range[1] === end;
  document.body.classList.toggle("zoomed", !reset.hidden);
  reset.textContent = `steps ${Math.round(range[0])} to ${Math.round(range[1])}: show all`;
  for (const chart of charts) chart.draw();
}

const charts = [...document.querySelectorAll("figure.chart")].map(figure => new Chart(figure));
reset.addEventListener("click", () => look([0, end]));
const films = [...document.querySelectorAll("video")];
for (const film of films) {  // its controls would cover a small video
  film.controls = false;
  film.addEventListener("pointerenter", () => { film.controls = true; });
  film.addEventListener("pointerleave", () => { film.controls = false; });
}
const play = document.getElementById("play");
if (play) play.addEventListener("click", () => {
  const still = films.every(film => film.paused);
  for (const film of films) if (still) film.play(); else film.pause();
  play.textContent = still ? "pause all" : "play all";
});
document.documentElement.dataset.ready = "yes";
"""
