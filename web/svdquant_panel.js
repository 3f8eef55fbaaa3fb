// The live panel in SVDQuant Quantize: attaches a view to each of these nodes and finds out which run is its own.
import { app } from "../../scripts/app.js";
import { element } from "./svdquant_dom.js";
import { NO_ID, chain, executionIds } from "./svdquant_nodes.js";
import { follow, runs } from "./svdquant_runs.js";
import { PanelView } from "./svdquant_view.js";

const WIDTH = 420;
const GAP = 40;
const MARGIN = 8;
const EMPTY = 36; // height of the hint, on one line
export const panels = new Set(); // those of nodes in a graph: a node that never gets there is never removed either
let frame = null;

class Panel {
  constructor(node) {
    this.node = node;
    this.view = new PanelView((file) => addLoader(node, file));
    this.height = EMPTY;
    this.widget = node.addDOMWidget("svdquant_panel", "svdquant_panel", this.view.element, {
      serialize: false,
      hideOnZoom: false,
      hideInPanel: true,
      margin: MARGIN,
      getMinHeight: () => this.height + 2 * MARGIN,
      getValue: () => "",
    });
    this.widget.serialize = false;
    this.#passOn();
    const sizes = new ResizeObserver(() => this.#fit());
    chain(node, "onAdded", () => {
      for (const section of this.view.sections) sizes.observe(section);
      panels.add(this);
      updateAll();
    });
    chain(node, "onRemoved", () => {
      sizes.disconnect();
      panels.delete(this);
    });
    chain(node, "onSerialize", (saved) => (saved.size[1] -= this.height - EMPTY)); // a run is no part of the workflow
  }

  /** Show the newest run of this node, in this workflow. */
  update() {
    this.view.show([...runs.values()].filter((run) => this.#owns(run)).at(-1) ?? null);
  }

  #owns(run) {
    const { graph } = this.node;
    if (!graph || !executionIds(this.node).includes(run.node)) return false;
    if (run.workflow !== NO_ID) return run.workflow === graph.rootGraph.id;
    // Cleared canvases have no name to tell them apart, and get one later: the file's name must do.
    return run === this.view.run || (!run.over && sameFile(run.file, this.node));
  }

  /** The wheel and the middle button work on the canvas, over the panel too; the keys that delete the node do not. */
  #passOn() {
    const on = (type, matters, act) =>
      this.view.element.addEventListener(type, (event) => matters(event) && act(event), { passive: false });
    on("wheel", () => true, (event) => {
      event.preventDefault();
      event.stopPropagation();
      app.canvas.processMouseWheel(event);
    });
    on("keydown", ({ key }) => key === "Delete" || key === "Backspace", (event) => event.stopPropagation());
    on("pointerdown", ({ button }) => button === 1, (event) => app.canvas.processMouseDown(event));
    on("pointermove", ({ buttons }) => buttons & 4, (event) => app.canvas.processMouseMove(event));
    on("pointerup", ({ button }) => button === 1, (event) => app.canvas.processMouseUp(event));
  }

  /** Make room for what there is to show, and give back what is not needed any more. */
  #fit() {
    const { node, view } = this;
    const wanted = view.naturalHeight();
    if (!wanted || wanted === this.height) return;
    const before = node.computeSize()[1];
    this.height = wanted;
    const needed = node.computeSize()[1];
    if (window.LiteGraph.vueNodesMode) return; // those nodes fit their content by themselves
    node.setSize([node.size[0], Math.max(needed, node.size[1] + needed - before)]);
    node.setDirtyCanvas(true, true);
  }
}

function sameFile(file, node) {
  const wanted = node.widgets.find((widget) => widget.name === "file_name")?.value;
  const plain = (name) => String(name).trim().replaceAll("\\", "/").replace(/\.safetensors$/, "");
  return plain(file) === plain(wanted);
}

/** Select the loader that takes its file from this node; without one, put one for `file` on the canvas. */
async function addLoader(node, file) {
  const { graph } = node;
  const loader = linkedLoader(node) ?? (await newLoader(node, graph, file));
  app.canvas.selectItems([loader]);
  if (!onScreen(loader)) app.canvas.centerOnNode(loader);
}

function linkedLoader({ graph, outputs }) {
  const links = (outputs[0].links ?? []).map((id) => graph.getLink(id));
  return links.map((link) => graph.getNodeById(link.target_id)).find((other) => other?.type === "SVDQuantLoader");
}

/** Right of the node and clear of others. */
async function newLoader(node, graph, file) {
  await app.refreshComboInNodes(); // the file is new: no list has it yet
  const loader = window.LiteGraph.createNode("SVDQuantLoader");
  graph.beforeChange();
  loader.pos = freePlace(graph, [node.pos[0] + node.size[0] + GAP, node.pos[1]], loader.size);
  graph.add(loader);
  loader.widgets.find((widget) => widget.name === "unet_name").value = file;
  graph.afterChange();
  return loader;
}

function onScreen({ pos, size }) {
  const [left, top, width, height] = app.canvas.visible_area;
  return pos[0] > left && pos[1] > top && pos[0] + size[0] < left + width && pos[1] + size[1] < top + height;
}

function freePlace(graph, [x, y], [width, height]) {
  const title = window.LiteGraph.NODE_TITLE_HEIGHT;
  const inTheWay = ({ pos, size }) =>
    pos[0] < x + width && pos[0] + size[0] > x && pos[1] - title < y + height && pos[1] + size[1] + title > y;
  for (let other; (other = graph.nodes.find(inTheWay)); ) y = other.pos[1] + other.size[1] + title + GAP;
  return [x, y];
}

/** Once per frame at most, however many events come. */
function updateAll() {
  frame ??= requestAnimationFrame(() => {
    frame = null;
    for (const panel of panels) panel.update();
  });
}

app.registerExtension({
  name: "SVDQuant.Panel",
  setup() {
    const href = new URL("./svdquant_panel.css", import.meta.url).href;
    document.head.append(element("link", { rel: "stylesheet", href }));
    follow(updateAll);
    setInterval(() => panels.forEach((panel) => panel.view.tick()), 1000);
  },
  nodeCreated(node) {
    if (node.comfyClass !== "SVDQuantQuantize") return;
    new Panel(node);
    const [width, height] = node.computeSize();
    node.setSize([Math.max(WIDTH, width), height]);
  },
  afterConfigureGraph: updateAll,
});
