// The runs of SVDQuant Quantize: followed by their websocket events, and fetched from the server where events were
// missed (after a reload, in a second tab, after the connection was lost).
import { api } from "../../scripts/api.js";

const STAGES = ["start", "calibrate", "hash", "skip", "solve", "write", "done", "stopped"];
const CHOSEN = "w4a4"; // layers in the format of the run

export class Run {
  /** From a run's `start` event. */
  constructor({ prompt_id, node, workflow, file, format, preset, rank, time }) {
    Object.assign(this, { prompt_id, node, workflow, file, format, preset, rank, started: time, seq: -1 });
    this.stage = "start";
    this.layers = [];
    this.kinds = new Set();
    this.skipped = [];
    this.pictures = []; // by prompt, one each
    this.errors = 0; // the sum of those that count for the mean
    this.counted = 0;
  }

  get over() {
    return this.stage === "done" || this.stage === "stopped" || Boolean(this.lost);
  }

  get mean() {
    return this.counted ? this.errors / this.counted : null;
  }

  /** Take in the next event, which the server sent `age` seconds ago. */
  apply(event, age = 0) {
    this.seq = event.seq;
    if (event.stage === "skip") {
      this.skipped.push(event);
      return;
    }
    if (event.stage === "calibrate") this.#calibrate(event);
    if (event.stage === "solve") this.#solve(event);
    if (event.stage === "done") this.#done(event);
    if (event.stage === "stopped") Object.assign(this, { reached: this.stage, ...pick(event, "reason", "interrupted") });
    this.stage = event.stage;
    this.eta = Date.now() + 1000 * (event.eta - age); // NaN where nobody knows
  }

  #calibrate(event) {
    if (event.prompt !== this.prompt) this.picture = null;
    Object.assign(this, pick(event, "prompt", "prompts", "step", "steps"));
    this.calibrated = event.index / event.total;
    this.picture = event.preview ?? this.picture;
    if (event.step === event.steps) this.pictures[event.prompt - 1] = this.picture;
  }

  #solve(event) {
    Object.assign(this, pick(event, "total", "total_bytes", "total_bytes_16bit"));
    this.kept ||= event.kept;
    this.#add(event);
  }

  #add(layer) {
    this.layers.push(layer);
    this.kinds.add(layer.kind);
    if (!this.worst || layer.error_db > this.worst.error_db) this.worst = layer;
    if (layer.kind === CHOSEN) {
      this.errors += layer.error_db;
      this.counted += 1;
    }
  }

  #done(event) {
    Object.assign(this, { ...pick(event, "summary", "bytes", "bytes_16bit"), seconds: event.time - this.started });
    this.keptLayers = event.kept;
    if (event.layers) {
      this.before = true; // the file was there already
      event.layers.forEach((layer) => this.#add(layer));
    }
    this.total = this.layers.length;
  }
}

function pick(object, ...names) {
  return Object.fromEntries(names.map((name) => [name, object[name]]));
}

const MOST_RUNS = 16;

/** One run per node of a workflow, the newest last. */
export const runs = new Map();
export const connection = { lost: false };
let changed = () => {};
let fetching = false;
let missed = false;

/** Follow all runs from now on; `onChange` is called after each change of one. */
export function follow(onChange) {
  changed = onChange;
  for (const stage of STAGES) api.addEventListener(`svdquant.${stage}`, ({ detail }) => receive(detail));
  api.addEventListener("reconnecting", () => {
    connection.lost = true;
    changed();
  });
  api.addEventListener("reconnected", refetch);
  refetch();
}

function keyOf({ workflow, node }) {
  return `${workflow} ${node}`;
}

function known(event) {
  const run = runs.get(keyOf(event));
  return run?.prompt_id === event.prompt_id ? run : null;
}

function begin(event) {
  const run = new Run(event);
  runs.delete(keyOf(event)); // a run that starts is the newest
  runs.set(keyOf(event), run);
  if (runs.size > MOST_RUNS) runs.delete(runs.keys().next().value);
  return run;
}

function receive(event) {
  const run = known(event) ?? (event.seq === 0 ? begin(event) : null);
  if (!run || event.seq > run.seq + 1) return refetch();
  if (event.seq <= run.seq) return;
  run.apply(event);
  changed();
}

async function refetch() {
  missed = true;
  if (fetching) return;
  fetching = true;
  try {
    while (missed) {
      missed = false;
      await fetchRuns();
    }
  } finally {
    fetching = false;
  }
}

async function fetchRuns() {
  const open = [...runs.values()].filter((run) => !run.over);
  const answer = await api.fetchApi("/svdquant/runs").catch(() => null);
  const { now, runs: lists } = (answer?.ok && (await answer.json().catch(() => null))) || {};
  if (!lists) return; // the server is not there; "reconnected" comes when it is
  connection.lost = false;
  const told = lists.map((events) => {
    const run = known(events[0]) ?? begin(events[0]);
    for (const event of events) if (event.seq > run.seq) run.apply(event, now - event.time);
    return run;
  });
  for (const run of open) if (!told.includes(run)) run.lost = true; // the server was started anew
  changed();
}
