// ComfyUI lists a pack's templates in the order of the file system. This sorts those of this pack by name.

import { api } from "../../scripts/api.js";

const pack = decodeURIComponent(import.meta.url.split("/").at(-2));
const list = api.getWorkflowTemplates;

api.getWorkflowTemplates = async function () {
  const templates = await list.call(this);
  templates[pack]?.sort();
  return templates;
};
