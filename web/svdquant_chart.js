// The error of every layer: one bar each, which appears when the layer is solved. Bars are grouped by block.
import { bytes, decibels, element, ratio } from "./svdquant_dom.js";

const LOWEST = -60; // dB; better than that is as good as exact
const DENSE = 120; // more bars than that have no gaps between them

export class ErrorChart {
  constructor() {
    this.bars = element("div", { className: "svdq-bars", role: "list", "aria-label": "Error per layer" });
    this.grid = element("div", { className: "svdq-grid", "aria-hidden": "true" });
    this.name = element("b", { dir: "auto" });
    this.facts = element("span");
    this.detail = element("div", { className: "svdq-detail", "aria-hidden": "true" }, this.name, this.facts);
    this.plot = element("div", { className: "svdq-plot" }, this.grid, this.bars);
    this.element = element("div", { className: "svdq-chart" }, this.plot);
    this.bars.addEventListener("pointerover", ({ target }) => this.#show(barOf(target)));
    this.bars.addEventListener("pointerleave", () => this.#show(barOf(document.activeElement)));
    this.bars.addEventListener("focusin", ({ target }) => this.#focus(barOf(target)));
    this.bars.addEventListener("focusout", () => this.#show(null));
    this.bars.addEventListener("keydown", (event) => this.#move(event));
    this.reset();
  }

  reset() {
    this.bars.replaceChildren();
    this.grid.replaceChildren();
    this.items = [];
    this.block = this.worst = this.shown = null;
    this.floor = this.ceiling = null;
    this.#show(null);
  }

  /**
   * Show `layers`, of `total` in the end; only those that came since the last call are added. The line under the
   * chart tells of the newest one, or when the run is `over` of the worst, until the user points at another.
   */
  update(layers, total, over) {
    this.plot.style.setProperty("--total", total);
    this.plot.classList.toggle("svdq-dense", total > DENSE);
    for (const layer of layers.slice(this.items.length)) this.#add(layer);
    this.over = over;
    if (!this.shown) this.#tell(this.#unasked);
  }

  get #unasked() {
    return this.over ? this.worst : this.items.at(-1);
  }

  #add(layer) {
    const bar = element("div", {
      className: `svdq-bar svdq-${layer.kind} ${layer.kept ? "svdq-kept" : ""}`,
      role: "listitem",
      tabIndex: this.items.length ? -1 : 0,
      "aria-label": `${layer.name}: ${factsOf(layer)}`,
    });
    bar.style.setProperty("--db", layer.error_db);
    bar.layer = layer;
    bar.index = this.items.push(bar) - 1;
    this.#scale(layer.error_db);
    this.#blockOf(layer.name).append(bar);
    if (!this.worst || layer.error_db > this.worst.layer.error_db) {
      this.worst?.classList.remove("svdq-worst");
      this.worst = bar;
      bar.classList.add("svdq-worst");
    }
  }

  /** The group of bars that a layer belongs to; a new one begins with a new block. */
  #blockOf(name) {
    const [, kind, number] = name.match(/^(.*?)\.(\d+)\./) ?? [null, name, ""];
    if (this.block?.name !== `${kind}.${number}`) {
      const group = element("div", { className: "svdq-block", role: "presentation" });
      const first = this.block?.kind !== kind;
      if (first) {
        group.classList.add("svdq-first");
        group.append(element("span", { className: "svdq-kind", "aria-hidden": "true" }, kind.replaceAll("_", " ")));
      }
      group.append(element("span", { className: "svdq-number", "aria-hidden": "true" }, number));
      group.dataset.every = number % 10 === 0 ? 10 : number % 5 === 0 ? 5 : 1;
      this.bars.append(group);
      this.block = { name: `${kind}.${number}`, kind, group, count: 0 };
    }
    this.block.group.style.setProperty("--count", (this.block.count += 1));
    return this.block.group;
  }

  /** Widen the axis to multiples of 5 dB around all errors. */
  #scale(db) {
    const floor = Math.min(this.floor ?? 0, Math.max(LOWEST, Math.floor(db / 5) * 5 - 5));
    const ceiling = Math.max(this.ceiling ?? -1000, Math.ceil(db / 5) * 5, floor + 10);
    if (floor === this.floor && ceiling === this.ceiling) return;
    Object.assign(this, { floor, ceiling });
    this.plot.style.setProperty("--floor", floor);
    this.plot.style.setProperty("--span", ceiling - floor);
    const step = ceiling - floor > 25 ? 10 : 5;
    const lines = [];
    for (let line = Math.ceil(floor / step) * step; line <= ceiling; line += step) {
      const tick = element("span", {}, `${line}`.replace("-", "−"));
      tick.style.setProperty("--db", line);
      lines.push(tick);
    }
    this.grid.replaceChildren(...lines);
  }

  #show(bar) {
    this.shown?.classList.remove("svdq-shown");
    bar?.classList.add("svdq-shown");
    this.shown = bar;
    this.#tell(bar ?? this.#unasked);
  }

  #tell(bar) {
    this.name.textContent = bar?.layer.name ?? "";
    this.facts.textContent = bar ? factsOf(bar.layer) : "";
  }

  /** One bar at a time is in the tab order; arrow keys walk along the others. */
  #focus(bar) {
    for (const other of this.bars.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
    bar.tabIndex = 0;
    this.#show(bar);
  }

  #move(event) {
    const index = barOf(event.target)?.index;
    const last = this.items.length - 1;
    const targets = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: last };
    if (!(event.key in targets)) return;
    event.preventDefault();
    event.stopPropagation(); // the canvas has a use for these keys too
    this.items[Math.min(last, Math.max(0, targets[event.key]))].focus();
  }
}

function barOf(target) {
  return target?.closest?.(".svdq-bar") ?? null;
}

function factsOf(layer) {
  const smoothing = layer.alpha === null ? "no smoothing" : `α ${layer.alpha}`;
  const branch = layer.kind === "w4a16" ? "weights only" : `${smoothing}, rank ${layer.rank}`;
  const size = `${bytes(layer.bytes_16bit)} in 16 bit, ${bytes(layer.bytes)} now`;
  const kept = layer.kept ? ", kept from an earlier run" : "";
  return `${decibels(layer.error_db)}, ${branch}, ${size} (${ratio(layer.bytes_16bit, layer.bytes)})${kept}`;
}
