// What the chosen files are, before anything is loaded: a read-only panel in SVDQuant Loader, LoRA and LoRA Stack.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { bytes, decibels, element, ratio } from "./svdquant_dom.js";
import { chain, isAbout } from "./svdquant_nodes.js";

const WIDTH = 340;
const SHEET_WIDTH = 460;
const MARGIN = 8;
const LOOK = 250; // ms between two looks at what the widgets and links say
const STACK = 5;
const NAMED = 2; // keys that apply to nothing; the report names all
const SVG = "http://www.w3.org/2000/svg";
const KINDS = {
  lora: "LoRA", lokr: "LoKr", loha: "LoHa", glora: "GLoRA", oft: "OFT", boft: "BOFT", dora: "DoRA",
  diff: "full-size", norm: "norm", set: "replacing",
}; // prettier-ignore
const LOADERS = ["SVDQuantLoader", "UNETLoader"]; // of the files that the server looks up
const panels = new Set();
const answers = new Map(); // by URL: what the server said, until files may have changed

class InfoPanel {
  constructor(node, describe) {
    this.node = node;
    this.describe = describe; // what to show: parts with a `text`, or a `url` to ask and `show` for the answer
    this.report = ""; // what the last run said
    this.content = element("div", { className: "svdqi-content" });
    this.element = element("div", { className: "svdqi", role: "status" }, this.content);
    this.height = 24;
    this.widget = node.addDOMWidget("svdquant_info", "svdquant_info", this.element, {
      serialize: false,
      hideOnZoom: false,
      hideInPanel: true,
      margin: MARGIN,
      getMinHeight: () => this.height + 2 * MARGIN,
      getMaxHeight: () => this.height + 2 * MARGIN,
      getValue: () => "",
    });
    this.widget.serialize = false;
    const sizes = new ResizeObserver(() => this.#fit());
    // A copy goes through a node that is on no canvas, and would never be removed from one.
    chain(node, "onAdded", () => {
      sizes.observe(this.content);
      panels.add(this);
    });
    chain(node, "onRemoved", () => {
      sizes.disconnect();
      panels.delete(this);
    });
  }

  /** Show what the widgets and links say now; nothing happens while they say the same. */
  async update() {
    if (this.node.size[1] !== this.drawn) this.node.setDirtyCanvas(true, true); // an image that came made it higher
    this.drawn = this.node.size[1];
    const question = keyOf(this.describe(this.node, ""));
    if (question !== this.question) this.report = ""; // it was about something else
    this.question = question;
    const parts = this.describe(this.node, this.report);
    const key = keyOf(parts);
    if (key === this.key) return;
    this.key = key;
    const shown = await Promise.all(parts.map(async (part) => part.show(part.url ? await ask(part.url) : null)));
    if (key === this.key) this.content.replaceChildren(...shown.flat());
  }

  /** A run's news are about what the widgets say now, seen by update() or not yet. */
  tell(report) {
    this.question = keyOf(this.describe(this.node, ""));
    this.report = report;
    this.update();
  }

  #fit() {
    const wanted = this.content.offsetHeight;
    if (!wanted || wanted === this.height) return;
    this.height = wanted;
    const { node } = this;
    const least = node.computeSize()[1];
    // The sheet of SVDQuant Compare may be as large as people like.
    node.setSize([node.size[0], node.comfyClass === "SVDQuantCompare" ? Math.max(least, node.size[1]) : least]);
    node.setDirtyCanvas(true, true);
  }
}

function keyOf(parts) {
  return JSON.stringify(parts.map(({ url, text, name }) => [url, text, name]));
}

async function ask(url) {
  if (!answers.has(url)) {
    const answer = api.fetchApi(url).then((response) => response.json());
    answers.set(url, answer.catch(() => ({ error: "The server does not answer." })));
  }
  return answers.get(url);
}

/** Files may have changed: ask again. */
function refresh() {
  answers.clear();
  for (const panel of panels) {
    panel.key = null;
    panel.update();
  }
}

// ---- what is chosen -------------------------------------------------------------------------------------

function valueOf(node, name) {
  return node.widgets?.find((widget) => widget.name === name)?.value;
}

function isLinked(node, name) {
  return node.inputs?.some((input) => input.name === name && input.link != null) ?? false;
}

/** A name as a widget's list, which is the server's, spells it; nothing if it is not in it. */
function offered(node, widget, name) {
  const plain = (text) => String(text).replaceAll("\\", "/"); // Windows' server lists sub\name
  return node.widgets.find((other) => other.name === widget)?.options.values?.find((value) => plain(value) === plain(name));
}

/** The name that a file widget will have when it runs; null where only the run can tell. */
function chosen(node, name) {
  if (!isLinked(node, name)) return valueOf(node, name);
  const source = node.getInputNode(node.inputs.findIndex((input) => input.name === name));
  if (source?.type === "PrimitiveNode") return source.widgets?.[0]?.value ?? null;
  if (source?.comfyClass !== "SVDQuantQuantize" || isLinked(source, "file_name")) return null;
  const file = String(valueOf(source, "file_name")).trim().replaceAll("\\", "/");
  return file.endsWith(".safetensors") ? file : `${file}.safetensors`;
}

/** The model file at the end of the chain of nodes that feeds a node's model input; null if there is none. */
function modelFile(node) {
  const seen = new Set();
  let current = node;
  while (current && !seen.has(current)) {
    seen.add(current);
    if (LOADERS.includes(current.comfyClass)) {
      const name = chosen(current, "unet_name") ?? known.get(current);
      return (/\.(safetensors|sft)$/.test(name ?? "") && offered(current, "unet_name", name)) || null;
    }
    const slot = current.inputs?.findIndex(({ type, name }) => type === "MODEL" || (type === "*" && !name)) ?? -1;
    current = slot < 0 ? null : current.getInputNode(slot);
  }
  return null;
}

const known = new WeakMap(); // loaders whose file name comes through a link: the name of their last run

// ---- SVDQuant Loader ------------------------------------------------------------------------------------

function describeLoader(node) {
  const name = chosen(node, "unet_name") ?? known.get(node);
  if (!name) return [note("What the file is will be shown here after a run: its name comes through a link.")];
  const file = offered(node, "unet_name", name);
  if (file) return [{ url: `/svdquant/file?name=${encodeURIComponent(file)}`, show: showModel }];
  if (isLinked(node, "unet_name")) return [note(`${name} is not there yet: the run will make it.`)];
  return [note(`${name} is not there. Choose another, or make it with SVDQuant Quantize (template quantize).`)];
}

function showModel(info) {
  if (info.error) return [text(info.error, "svdqi-warning"), ...(info.bytes ? [text(bytes(info.bytes))] : [])];
  const facts = element("dl", { className: "svdqi-facts" });
  const fact = (term, ...words) => {
    const said = words.filter(Boolean).join(", ");
    if (said) facts.append(element("dt", {}, term), element("dd", { dir: "auto" }, said));
  };
  fact("size", bytes(info.bytes), `${ratio(info.bytes_16bit, info.bytes)} smaller than 16 bit`);
  if (info.layers) fact("mean error", `${decibels(info.mean_error_db)} per layer, worst ${decibels(worstOf(info.layers))}`);
  fact("saved", new Date(1000 * info.modified).toLocaleString([], { dateStyle: "medium", timeStyle: "short" }));
  fact("from", info.source);
  fact("calibration", calibrationOf(info.calibration));
  if (!info.layers) fact("made by", "another tool, which left no more facts");
  return [
    element("div", { className: "svdqi-head" },
      element("b", {}, titleOf(info)),
      element("span", {}, [info.format, rankOf(info.ranks), info.preset && `preset ${info.preset}`].filter(Boolean).join(", "))),
    ...(info.layers ? [miniChart(info.layers), text(legendOf(info.layers), "svdqi-legend")] : []),
    facts,
  ]; // prettier-ignore
}

function titleOf({ model, release, blocks, parameters }) {
  if (release) return `${model} ${release}`;
  const size = `${(parameters / 1e6).toFixed(parameters < 1e8 ? 1 : 0)} M parameters`;
  return blocks ? `${model}, ${blocks.join(" + ")} blocks, ${size}` : `${model}, ${size}`;
}

function rankOf(ranks) {
  if (!ranks.length) return "";
  return `rank ${ranks.length > 1 ? `${ranks[0]}–${ranks.at(-1)}` : ranks[0]}`;
}

function worstOf(layers) {
  return Math.max(...layers.map((layer) => layer.error_db));
}

function calibrationOf(calibration) {
  if (calibration?.kind === "file") return calibration.file;
  if (calibration?.kind !== "sampled") return calibration?.kind;
  const { prompts, steps, size } = calibration;
  return `${prompts} ${prompts === 1 ? "prompt" : "prompts"} of ${steps} ${steps === 1 ? "step" : "steps"}, ${size} pixels`;
}

function legendOf(layers) {
  const others = [["w8a8", "green: 8 bit"], ["w4a16", "amber: weights only"]];
  const told = others.filter(([kind]) => layers.some((layer) => layer.kind === kind)).map(([, words]) => words);
  return `error of every layer${told.length ? ` (${told.join(", ")})` : ""}`;
}

/** The error of every layer as thin bars, in the model's order; shorter is better. */
function miniChart(layers) {
  const svg = document.createElementNS(SVG, "svg");
  const errors = layers.map((layer) => layer.error_db);
  const floor = Math.min(...errors) - 5;
  const span = Math.max(...errors) - floor;
  svg.setAttribute("viewBox", `0 0 ${layers.length} 1`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("class", "svdqi-chart");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Error of ${layers.length} layers, ${decibels(Math.min(...errors))} to ${decibels(Math.max(...errors))}`);
  for (const colour of ["w4a4", "w8a8", "w4a16"]) {
    const path = document.createElementNS(SVG, "path");
    const bars = layers.map(({ kind, error_db }, i) =>
      kind === colour ? `M${i + 0.1} 1V${1 - (error_db - floor) / span}H${i + 0.9}V1Z` : "");
    path.setAttribute("d", bars.join(""));
    path.setAttribute("class", `svdqi-${colour}`);
    svg.append(path);
  }
  return svg;
}

// ---- SVDQuant LoRA and LoRA Stack -----------------------------------------------------------------------

function describeLora(node, report) {
  const name = chosen(node, "lora_name");
  if (!name) return [note(name === null ? "The LoRA's name comes through a link: see the report after a run." : "No LoRA is chosen.")];
  return [loraPart(node, "lora_name", name, valueOf(node, "strength"), false), ...reported(report), against(node)];
}

function describeStack(node, report) {
  const rows = [];
  for (let i = 1; i <= STACK; i++) {
    const name = chosen(node, `lora_${i}`);
    if (valueOf(node, `on_${i}`) && name && name !== "none") rows.push(loraPart(node, `lora_${i}`, name, valueOf(node, `strength_${i}`), true));
  }
  return rows.length ? [...rows, ...reported(report), against(node)] : [note("No LoRA is on.")];
}

/** One LoRA; `named` where there are several. */
function loraPart(node, widget, name, strength, named) {
  const title = () => (named ? [text(name, "svdqi-name")] : []);
  if (strength === 0) return { name, text: "off", show: () => [...title(), text("Strength 0: not applied.")] };
  const file = offered(node, widget, name);
  if (!file) return { name, text: "gone", show: () => [...title(), text(`${name} is not there.`)] };
  const model = modelFile(node);
  const query = new URLSearchParams({ name: file, ...(model ? { model } : {}) });
  return { name, url: `/svdquant/lora?${query}`, show: (info) => [...title(), ...showLora(info)] };
}

function reported(report) {
  return report ? [{ text: report, show: () => text(report) }] : [];
}

function showLora(info) {
  if (info.error) return [text(info.error, "svdqi-warning")];
  const kinds = Object.entries(info.kinds).map(([kind, count]) => `${count} ${KINDS[kind] ?? kind}`);
  const facts = [...kinds, rankOf(info.ranks), bytes(info.bytes)].filter(Boolean).join(", ");
  const lines = [
    element("div", { className: "svdqi-head" },
      element("b", { className: info.applied === info.keys ? "svdqi-all" : "svdqi-some" }, `${info.applied} of ${info.keys} keys apply`),
      element("span", {}, facts)),
  ]; // prettier-ignore
  if (info.unused) {
    const names = info.unused_names.slice(0, NAMED);
    const more = info.unused > names.length ? [`and ${info.unused - names.length} more`] : [];
    lines.push(text(`${info.unused} of no layer of this model:`, "svdqi-warning"));
    lines.push(...[...names, ...more].map((name) => text(name, "svdqi-key")));
  }
  if (info.text_encoder) lines.push(text(`${info.text_encoder} for the text encoder: apply them with Load LoRA and its CLIP.`));
  if (info.twice) lines.push(text(`${info.twice} keys name layers that others name, too: used once.`));
  if (info.in_16_bit) lines.push(text(`${info.in_16_bit} layers will run in 16 bit while it is applied.`));
  return lines;
}

/** What the keys were counted against. */
function against(node) {
  const model = modelFile(node);
  return note(model ? `Counted for ${model}` : "Counted for FLUX.1 by name: the model's file is not known.");
}

function note(words) {
  return { text: words, show: () => text(words, "svdqi-note") };
}

function text(words, className = "") {
  return element("div", { className, dir: "auto" }, words);
}

// ---- SVDQuant Compare -----------------------------------------------------------------------------------

/** What a run says while it goes on, then its report, which goes where ComfyUI's preview of the sheet goes. */
function describeCompare(node, news) {
  const outputs = node.graph && app.nodeOutputs[node.graph.isRootGraph ? node.id : `${node.graph.id}:${node.id}`];
  const report = news || outputs?.svdquant_report?.[0];
  if (report) return [{ text: report, show: () => text(report, "svdqi-report") }];
  const linked = node.inputs.some((input) => input.link != null && !input.widget);
  return [note(linked ? "Not run yet." : "Connect model_a, model_b, positive and vae, or images_a and images_b.")];
}

// ---- the extension --------------------------------------------------------------------------------------

const DESCRIBE = {
  SVDQuantLoader: describeLoader,
  SVDQuantLoRA: describeLora,
  SVDQuantLoRAStack: describeStack,
  SVDQuantCompare: describeCompare,
};

/** Tell the panels of the node that an event is about; `classes` are those that it can be about. */
function passOn(event, classes, act) {
  for (const panel of panels) {
    if (classes.includes(panel.node.comfyClass) && isAbout(panel.node, event.detail)) act(panel);
  }
}

/** There is a new file, or a changed one: offer it in all loaders, those to come included. */
async function relist() {
  const answer = await api.fetchApi("/object_info/SVDQuantLoader").then((response) => response.json()).catch(() => null);
  const values = answer?.SVDQuantLoader?.input.required.unet_name[1].options;
  if (!values) return;
  window.LiteGraph.registered_node_types.SVDQuantLoader.nodeData.inputs.unet_name.options = values;
  for (const { node } of panels) {
    if (node.comfyClass === "SVDQuantLoader") node.widgets.find(({ name }) => name === "unet_name").options.values = values;
  }
  refresh();
}

app.registerExtension({
  name: "SVDQuant.Info",
  setup() {
    const href = new URL("./svdquant_info.css", import.meta.url).href;
    document.head.append(element("link", { rel: "stylesheet", href }));
    api.addEventListener("svdquant.done", relist);
    api.addEventListener("svdquant.file", (event) =>
      passOn(event, ["SVDQuantLoader"], ({ node }) => known.set(node, event.detail.name)));
    api.addEventListener("svdquant.report", (event) =>
      passOn(event, ["SVDQuantLoRA", "SVDQuantLoRAStack", "SVDQuantCompare"], (panel) => panel.tell(event.detail.text)));
    api.addEventListener("executed", (event) => passOn(event, ["SVDQuantCompare"], (panel) => panel.tell("")));
    // Widgets, links and nodes upstream change in many ways, and not all of them call back.
    setInterval(() => document.hidden || panels.forEach((panel) => panel.update()), LOOK);
  },
  nodeCreated(node) {
    const describe = DESCRIBE[node.comfyClass];
    if (!describe) return;
    new InfoPanel(node, describe);
    node.setSize([Math.max(node.comfyClass === "SVDQuantCompare" ? SHEET_WIDTH : WIDTH, node.size[0]), node.size[1]]);
  },
  refreshComboInNodes: refresh,
});
