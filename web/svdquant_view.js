// What the panel shows of one run. `show(run)` may be called at any time and adds only what is new.
import { ErrorChart } from "./svdquant_chart.js";
import { bytes, decibels, duration, element, ratio } from "./svdquant_dom.js";
import { connection } from "./svdquant_runs.js";

const HINT = "Pictures and the error of every layer appear here while it runs.";
const SPACE = 8; // around and between the sections, as in the style sheet
const PLOT_HEIGHT = 140; // at least
const PARTS = { calibrate: "Calibrate", solve: "Solve", write: "Write" };

export class PanelView {
  /** `onLoad(file)` is called by the button that asks for a loader, which waits until that has ended. */
  constructor(onLoad) {
    this.chart = new ErrorChart();
    this.#build();
    this.button.addEventListener("click", async (event) => {
      event.stopPropagation(); // it would select the node after the loader
      this.button.disabled = true;
      await onLoad(this.run.file).finally(() => (this.button.disabled = false));
    });
    this.show(null);
  }

  #build() {
    const part = (name, ...children) => (this[name] = element("div", { className: `svdq-${name}` }, ...children));
    const text = (name, tag = "span") => (this[name] = element(tag, { className: `svdq-${name}` }));
    this.live = element("span", { className: "svdq-live", role: "status", "aria-live": "polite" });
    this.bars = Object.keys(PARTS).map((name) => element("span", { className: "svdq-part" }, element("i"), PARTS[name]));
    const progress = { className: "svdq-progress", role: "progressbar", "aria-label": "SVDQuant Quantize" };
    this.progress = element("div", { ...progress, "aria-valuemin": "0", "aria-valuemax": "100" }, ...this.bars);
    this.current = element("img", { alt: "The picture that is being sampled" });
    this.caption = element("figcaption");
    this.sampling = element("figure", {}, this.current, this.caption);
    this.strip = element("div", { className: "svdq-strip", role: "list", "aria-label": "Calibration pictures" });
    this.legend = element("span", { className: "svdq-legend" });
    this.stats = element("dl", { className: "svdq-stats" });
    this.skips = element("ul");
    this.skipCount = element("summary");
    this.button = element("button", { type: "button", textContent: "Add SVDQuant Loader" });
    this.button.title = "Put a loader for this file on the canvas, next to this node";
    const sections = [
      text("hint", "p"),
      part("head", text("stage", "strong"), text("eta")),
      this.progress,
      text("note", "p"),
      part("job", text("file"), text("settings")),
      part("calibration", this.sampling, this.strip),
      part("errors", element("div", { className: "svdq-title" }, "Error per layer (dB, lower is better)", this.legend), this.chart.element),
      this.chart.detail,
      this.stats,
      (this.skipped = element("details", { className: "svdq-skipped" }, this.skipCount, this.skips)),
      this.button,
    ];
    this.hint.textContent = HINT;
    this.element = element("div", { className: "svdq", role: "group", "aria-label": "SVDQuant progress" }, ...sections, this.live);
    this.sections = sections;
  }

  /** Show a run, or the hint when there is none. */
  show(run) {
    if (run !== this.run) this.#reset(run);
    this.element.dataset.state = run ? (run.lost ? "stopped" : run.stage) : "none";
    for (const section of this.sections) section.hidden = !run && section !== this.hint;
    this.hint.hidden = Boolean(run);
    if (!run) return;
    this.#showStage(run);
    this.#showCalibration(run);
    this.#showLayers(run);
    this.#showStats(run);
    this.button.hidden = run.stage !== "done";
    this.tick();
  }

  /** The height that the content needs, in pixels of the canvas at zoom 1; 0 while it is not on the screen. */
  naturalHeight() {
    const heights = this.sections.map((section) => section.offsetHeight).filter(Boolean);
    const plot = this.chart.plot.offsetHeight;
    const stretched = plot ? plot - PLOT_HEIGHT : 0;
    return heights.length && heights.reduce((sum, height) => sum + height + SPACE, SPACE) - stretched;
  }

  /** The time that is left goes down between two events too. */
  tick() {
    const { run } = this;
    if (run) this.eta.textContent = connection.lost && !run.over ? "connection lost" : timeOf(run);
  }

  #reset(run) {
    this.run = run;
    this.chart.reset();
    this.strip.replaceChildren();
    this.skips.replaceChildren();
    this.skipped.open = false;
    this.current.removeAttribute("src");
    if (!run) return;
    this.file.textContent = this.file.title = run.file;
    this.settings.textContent = [run.format, run.rank ? `rank ${run.rank}` : "no branch", run.preset].join(" · ");
  }

  #showStage(run) {
    const [words, detail] = stageOf(run);
    this.stage.textContent = detail ? `${words}: ${detail}` : words;
    const note = noteOf(run);
    setText(this.live, run.over ? [words, note].filter(Boolean).join(". ") : words); // not for every layer
    this.note.textContent = note;
    this.note.hidden = !note;
    const shares = sharesOf(run);
    this.bars.forEach((bar, i) => bar.style.setProperty("--share", shares[i]));
    const whole = Math.round(100 * (0.5 * shares[0] + 0.47 * shares[1] + 0.03 * shares[2]));
    this.progress.setAttribute("aria-valuenow", whole);
    this.progress.setAttribute("aria-valuetext", this.stage.textContent);
    this.progress.hidden = run.stage === "done";
  }

  #showCalibration(run) {
    const sampling = run.stage === "calibrate" && !run.lost;
    this.calibration.hidden = !run.prompts;
    if (!run.prompts) return;
    this.sampling.hidden = !sampling;
    if (sampling) {
      if (run.picture) this.current.src = run.picture;
      this.caption.textContent = `step ${run.step} of ${run.steps}`;
    }
    this.strip.style.setProperty("--columns", Math.max(6, Math.ceil(Math.sqrt(5 * run.prompts))));
    for (let i = this.strip.childElementCount; i < run.prompts; i++) {
      this.strip.append(element("span", { role: "listitem", "aria-label": `Prompt ${i + 1}: to come` }));
    }
    [...this.strip.children].forEach((place, i) => {
      place.classList.toggle("svdq-now", sampling && i === run.prompt - 1);
      const picture = run.pictures[i];
      if (!picture || place.firstChild) return;
      place.append(element("img", { src: picture, alt: "" }));
      place.setAttribute("aria-label", `Prompt ${i + 1}: sampled`);
    });
  }

  #showLayers(run) {
    this.errors.hidden = this.chart.detail.hidden = !run.layers.length;
    if (!run.layers.length) return;
    this.chart.update(run.layers, run.total, run.over);
    this.#showLegend(run);
  }

  #showLegend(run) {
    const entries = { w4a4: run.format, w8a8: "8 bit", w4a16: "weights only", kept: "kept" };
    const shown = Object.keys(entries).filter((kind) => (kind === "kept" ? run.kept : run.kinds.has(kind)));
    const texts = shown.map((kind) => entries[kind]);
    if (this.legend.dataset.shown === texts.join()) return;
    this.legend.dataset.shown = texts.join();
    this.legend.replaceChildren(...shown.map((kind) => element("span", { className: `svdq-${kind}` }, entries[kind])));
  }

  #showStats(run) {
    this.stats.hidden = !run.layers.length;
    this.skipped.hidden = !run.skipped.length;
    for (const { name, reason } of run.skipped.slice(this.skips.childElementCount)) {
      this.skips.append(element("li", {}, `${name}: ${reason}`));
    }
    this.skipCount.textContent = `${run.skipped.length} ${run.skipped.length === 1 ? "layer stays" : "layers stay"} 16 bit`;
    if (!run.layers.length) return;
    const [small, large] = run.bytes ? [run.bytes, run.bytes_16bit] : [run.total_bytes, run.total_bytes_16bit];
    const tiles = [
      [run.bytes ? "File" : "Solved so far", bytes(small), `16 bit: ${bytes(large)}`],
      ["Smaller", ratio(large, small), run.bytes ? "the whole file" : "these layers"],
      ["Mean error", run.mean === null ? "–" : decibels(run.mean), `of ${run.counted} layers`],
      ["Worst layer", decibels(run.worst.error_db), run.worst.name],
    ];
    if (this.stats.childElementCount !== tiles.length) {
      this.stats.replaceChildren(...tiles.map(() => element("div", {}, element("dt"), element("dd"), element("dd"))));
    }
    tiles.forEach((words, i) => words.forEach((word, j) => setText(this.stats.children[i].children[j], word)));
    this.stats.title = run.summary ?? "";
    this.stats.lastChild.title = run.worst.name;
  }
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** [what happens, how far it is]. */
function stageOf(run) {
  if (run.lost) return ["The server was restarted"];
  const layers = `layer ${run.layers.length} of ${run.total}`;
  return {
    start: ["Preparing"],
    calibrate: ["Calibrating", `prompt ${run.prompt} of ${run.prompts}`],
    hash: ["Reading the source file"],
    solve: ["Solving", layers],
    write: ["Writing the file"],
    done: [run.before ? "Done before" : "Done", `${run.total} layers`],
    stopped: [run.interrupted ? "Interrupted" : "Failed"],
  }[run.stage];
}

/** In words, for a run that has ended: what went wrong, and what is kept of it. */
function noteOf(run) {
  if (run.before) return "This very job was finished earlier: its file is kept as it is.";
  if (run.stage === "done" && run.keptLayers) return `${run.keptLayers} of ${run.total} layers were kept from an earlier run.`;
  if (run.stage !== "stopped" && !run.lost) return "";
  const reached = run.lost ? run.stage : run.reached;
  const failure = run.lost || run.interrupted ? "" : `${run.reason}\n`;
  const again = "Run again with the same settings to go on from there.";
  if (run.layers.length) return `${failure}The calibration and ${run.layers.length} of ${run.total} layers are kept. ${again}`;
  if (reached === "calibrate") return `${failure}A calibration is kept once it is complete; the next run samples again.`;
  return reached === "start" ? failure : `${failure}The calibration is kept. ${again}`;
}

/** How much of calibrating, solving and writing is done. */
function sharesOf(run) {
  const solving = run.layers.length / (run.total || Infinity);
  const writing = run.stage === "write" ? 0.5 : 0;
  const calibrated = run.layers.length || ["hash", "solve", "write"].includes(run.stage) ? 1 : (run.calibrated ?? 0);
  return run.stage === "done" ? [1, 1, 1] : [calibrated, solving, writing];
}

function timeOf(run) {
  if (run.stage === "done") return run.before ? "" : `in ${duration(run.seconds)}`;
  if (run.over || !Number.isFinite(run.eta)) return "";
  const left = `about ${duration((run.eta - Date.now()) / 1000)}`;
  return run.stage === "calibrate" ? `${left}, then the layers` : `${left} left`;
}
