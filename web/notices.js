// Removes a notice (nodes/host/notices.py) from its node when the node runs again: ComfyUI would keep it.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NAME = "$$node-text-preview"; // ComfyUI's widget for texts of running nodes
const MARK = "⚠";

function clear(node) {
  const index = node.widgets?.findIndex(({ name, value }) => name === NAME && String(value).startsWith(MARK)) ?? -1;
  if (index < 0) return;
  node.widgets[index].onRemove?.();
  node.widgets.splice(index, 1);
  node.setDirtyCanvas(true, true);
}

api.addEventListener("executing", ({ detail }) => {
  let graph = app.rootGraph ?? app.graph;
  for (const id of String(detail ?? "").split(":")) {
    const node = graph?.getNodeById(id); // inside a subgraph: also the nodes around it
    if (!node) return;
    clear(node);
    graph = node.subgraph;
  }
});
