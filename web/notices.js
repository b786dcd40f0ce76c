// A notice (nodes/host/notices.py) on a node stays until the node runs again, and is not saved with the workflow.
// ComfyUI would keep its text, frontend 1.27 save it, and frontend 1.58 remove it when the prompt ends.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NAME = "$$node-text-preview"; // ComfyUI's widget for texts of running nodes
const MARK = "⚠";
const LETTER = [6.5, 16]; // width and height of a letter in that widget in pixels
const MARGIN = [52, 30]; // the same around its text
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

// Returns the height of a text on a node, which grows for it; ComfyUI's widget would show two lines.
function heightOf(text, node) {
  const letters = Math.max(1, (node.size[0] - MARGIN[0]) / LETTER[0]);
  const lines = text.split("\n").map((line) => Math.ceil(line.length / letters));
  return MARGIN[1] + LETTER[1] * lines.reduce((sum, count) => sum + count, 0);
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

api.addEventListener("progress_text", ({ detail: { nodeId, text } }) => {
  const node = nodesAt(nodeId).at(-1);
  if (!node || !text.startsWith(MARK)) return;
  shown.set(node, { nodeId, text });
  setTimeout(() => {
    const notice = noticeOn(node);
    if (!notice) return;
    notice.serialize = false;
    notice.options.getMinHeight = () => heightOf(text, node);
    node.setDirtyCanvas(true, true);
  });
});

// Shows the notices that the frontend has removed.
function showAgain() {
  for (const [node, event] of shown) {
    if (nodesAt(event.nodeId).at(-1) !== node) shown.delete(node);
    else if (node.graph === app.canvas.graph && !noticeOn(node)) api.dispatchCustomEvent("progress_text", event);
  }
}

for (const end of ENDS) api.addEventListener(end, () => setTimeout(showAgain));
