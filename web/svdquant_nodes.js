// Nodes on the canvas: which of them an event of the server is about, and what happens to them.

export const NO_ID = "00000000-0000-0000-0000-000000000000"; // what a canvas that was cleared calls its workflow

/** The ids under which the server runs a node: "5", or "3:5" inside a subgraph, one for each use of that subgraph. */
export function executionIds(node) {
  const found = [];
  const visit = (graph, path) => {
    if (graph === node.graph) found.push([...path, node.id].join(":"));
    for (const inner of graph.nodes) if (inner.subgraph) visit(inner.subgraph, [...path, inner.id]);
  };
  visit(node.graph.rootGraph, []);
  return found;
}

/** Whether an event with a `node` and a `workflow` is about this node. A workflow without an id goes by the node's. */
export function isAbout(node, { node: id, workflow }) {
  if (!node.graph || !executionIds(node).includes(String(id))) return false;
  return !workflow || workflow === NO_ID || workflow === node.graph.rootGraph.id;
}

/** Call `added` after a node's own callback `name`, with the same arguments. */
export function chain(node, name, added) {
  const before = node[name];
  node[name] = function (...args) {
    before?.apply(this, args);
    added(...args);
  };
}
