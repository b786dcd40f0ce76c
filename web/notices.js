// A notice (nodes/host/notices.py) on a node goes away when the node runs again, and is not saved with the workflow.
// ComfyUI would keep its text, and frontend 1.27 save it.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NAME = "$$node-text-preview"; // ComfyUI's widget for texts of running nodes
const MARK = "⚠";

// Calls `act` with each notice on a node; inside a subgraph, also with those on the nodes around it.
function each(path, act) {
  let graph = app.rootGraph ?? app.graph;
  for (const id of String(path ?? "").split(":")) {
    const node = graph?.getNodeById(id);
    if (!node) return;
    const notice = node.widgets?.find(({ name, value }) => name === NAME && String(value).startsWith(MARK));
    if (notice) act(node, notice);
    graph = node.subgraph;
  }
}

api.addEventListener("executing", ({ detail }) =>
  each(detail, (node, notice) => {
    node.removeWidget(notice);
    node.setDirtyCanvas(true, true);
  }),
);

api.addEventListener("progress_text", ({ detail }) =>
  setTimeout(() => each(detail.nodeId, (_, notice) => (notice.serialize = false))),
);
