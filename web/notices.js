// A notice (nodes/host/notices.py) on a node stays until the node runs again, and is not saved with the workflow.
// ComfyUI would keep its text, frontend 1.27 save it, and frontend 1.58 remove it when the prompt ends.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NAME = "$$node-text-preview"; // ComfyUI's widget for texts of running nodes
const MARK = "⚠";
const ENDS = ["execution_success", "execution_error", "execution_interrupted"];

const shown = new Map(); // the event that showed a notice, by its node

// Returns the node at a path of ids and, inside a subgraph, the nodes around it, outermost first.
function nodesAt(path) {
  const nodes = [];
  let graph = app.rootGraph ?? app.graph;
  for (const id of String(path ?? "").split(":")) {
    const node = graph?.getNodeById(id);
    if (!node) return [];
    nodes.push(node);
    graph = node.subgraph;
  }
  return nodes;
}

function noticeOn(node) {
  return node.widgets?.find(({ name, value }) => name === NAME && String(value).startsWith(MARK));
}

api.addEventListener("executing", ({ detail }) => {
  for (const node of nodesAt(detail)) {
    shown.delete(node);
    const notice = noticeOn(node);
    if (!notice) continue;
    node.removeWidget(notice);
    node.setDirtyCanvas(true, true);
  }
});

api.addEventListener("progress_text", ({ detail: { nodeId, text } }) =>
  setTimeout(() => {
    const node = nodesAt(nodeId).at(-1);
    const notice = node && noticeOn(node);
    if (!notice) return;
    notice.serialize = false;
    shown.set(node, { nodeId, text });
  }),
);

function showAgain() {
  for (const [node, event] of shown) {
    if (nodesAt(event.nodeId).at(-1) !== node) shown.delete(node);
    else if (node.graph === app.canvas.graph && !noticeOn(node)) api.dispatchCustomEvent("progress_text", event);
  }
}

for (const end of ENDS) api.addEventListener(end, () => setTimeout(showAgain));
