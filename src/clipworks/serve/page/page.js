// The page: search, classify, segment, few shots. Nothing is fetched from anywhere but the service it came from, and
// words of users and files only ever become text, never markup.

const $ = (id) => document.getElementById(id);
const SHOWN = 8; // labels of one answer

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// --- talking to the service ---

async function call(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = { ...(options.headers ?? {}), ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new Error("The service does not answer.");
  }
  if (response.ok) return response.json();
  if (response.status === 401) {
    $("token-form").hidden = false;
    $("token").focus();
  }
  const said = await response.json().catch(() => null);
  throw new Error(said?.error?.message ?? `The service answered ${response.status}.`);
}

function form(entries) {
  const data = new FormData();
  for (const [name, value] of entries) {
    if (value instanceof File) data.append(name, value, "picture");
    else data.append(name, value);
  }
  return { method: "POST", body: data };
}

// A form's button rests while its work is done; what came of it is said where screen readers hear it.
async function doing(element, status, work) {
  const buttons = element.querySelectorAll("button");
  for (const button of buttons) button.disabled = true;
  say(status, "Working …");
  const start = performance.now();
  try {
    const done = await work();
    say(status, `${done} ${Math.round(performance.now() - start)} ms.`);
  } catch (error) {
    say(status, error.message, true);
  } finally {
    for (const button of buttons) button.disabled = false;
  }
}

function say(status, text, bad = false) {
  status.textContent = text;
  status.classList.toggle("bad", bad);
}

// --- pictures ---

function shown(file, alt) {
  const image = make("img", { alt });
  image.src = URL.createObjectURL(file);
  image.onload = () => URL.revokeObjectURL(image.src);
  return image;
}

// A place to drop files; choosing them works by mouse, keyboard and touch alike.
function droppable(zone, take) {
  const input = zone.querySelector("input[type=file]");
  const several = input.multiple;
  input.addEventListener("change", () => {
    const files = [...input.files];
    input.value = ""; // so that the same file can be chosen again
    if (files.length) take(several ? files : files.slice(0, 1));
  });
  zone.addEventListener("dragover", (event) => {
    event.preventDefault();
    zone.classList.add("over");
  });
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    const files = [...event.dataTransfer.files];
    if (files.length) take(several ? files : files.slice(0, 1));
  });
}

function answers(list, files, pictures) {
  list.replaceChildren(
    ...pictures.map(({ predictions }, place) => {
      const rows = predictions.slice(0, SHOWN).map(({ label, probability }) => {
        const percent = `${(100 * probability).toFixed(1)} %`;
        const meter = make("meter", { min: 0, max: 1, value: probability, "aria-label": `${label}: ${percent}` });
        return make("tr", {}, make("th", { scope: "row" }, label), make("td", {}, meter, ` ${percent}`));
      });
      const name = files[place].name;
      const caption = make("caption", { class: "hint" }, name);
      return make("li", {}, shown(files[place], name), make("table", {}, caption, make("tbody", {}, ...rows)));
    }),
  );
}

const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

// --- search ---

let wanted = null; // the picture that is searched for
let hits = [];

function show(file) {
  wanted = file;
  const text = make("span", {}, file ? `Like ${file.name}` : "Drop a picture here, or choose one");
  const input = $("search-image");
  $("search-drop").replaceChildren(input, ...(file ? [shown(file, "")] : []), text);
  $("search-clear").hidden = !file;
}

function showHits() {
  const least = Number($("search-least").value);
  const kept = hits.filter((hit) => hit.score >= least);
  $("hits").replaceChildren(
    ...kept.map((hit) => {
      const name = hit.kind === "image" ? hit.path.split(/[\\/]/).pop() : "";
      let picture = make("div", { class: "none" }, hit.caption ?? "");
      if (hit.thumbnail) {
        picture = make("img", { src: hit.thumbnail, alt: hit.caption ?? name, loading: "lazy" });
        picture.onerror = () => picture.replaceWith(make("div", { class: "none" }, "cannot be shown"));
      }
      const size = hit.kind === "image" ? ` ${hit.width}×${hit.height}` : "";
      const caption = make("figcaption", {}, make("span", { class: "score" }, hit.score.toFixed(3)), ` ${name}${size}`);
      return make("li", { title: hit.path, tabindex: "0" }, make("figure", {}, picture, caption));
    }),
  );
  return kept.length;
}

function search() {
  return doing($("search-form"), $("search-status"), async () => {
    const text = $("search-text").value.trim();
    const where = $("search-where").value.trim();
    const entries = [["k", $("search-k").value], ["kind", $("search-kind").value]];
    if (text) entries.push(["text", text]);
    if (where) entries.push(["where", where]);
    if (wanted) entries.push(["image", wanted]);
    if (!text && !wanted) throw new Error("Give words or a picture.");
    hits = (await call("search", form(entries))).hits;
    return `${plural(showHits(), "hit")} in`;
  });
}

$("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});
$("search-least").addEventListener("input", showHits);
$("search-clear").addEventListener("click", () => {
  show(null);
  $("search-text").focus();
});
droppable($("search-drop"), ([file]) => {
  show(file);
  search();
});

// --- classify ---

let toClassify = [];

function classify() {
  return doing($("classify-form"), $("classify-status"), async () => {
    const labels = lines($("labels"));
    if (!labels.length) throw new Error("Give at least one label.");
    if (!toClassify.length) throw new Error("Give at least one picture.");
    const entries = labels.map((label) => ["labels", label]);
    entries.push(["template", $("template").value], ...toClassify.map((file) => ["images", file]));
    const found = await call("classify", form(entries));
    answers($("classified"), toClassify, found.pictures);
    return `${plural(found.pictures.length, "picture")} in`;
  });
}

$("classify-form").addEventListener("submit", (event) => {
  event.preventDefault();
  classify();
});
droppable($("classify-drop"), (files) => {
  toClassify = files;
  classify();
});

// --- segment ---

let toSegment = null;

const lines = (area) => [...new Set(area.value.split("\n").map((line) => line.trim()).filter(Boolean))];

function segment() {
  return doing($("segment-form"), $("segment-status"), async () => {
    const labels = lines($("places"));
    if (!labels.length) throw new Error("Give at least one label.");
    if (!toSegment) throw new Error("Give a picture.");
    const entries = [["image", toSegment], ...labels.map((label) => ["labels", label])];
    const background = $("segment-background").value;
    if (background) entries.push(["background", background]);
    if (Number($("segment-unknown").value) > 0) entries.push(["unknown_below", $("segment-unknown").value]);
    const found = await call("segment", form(entries));
    const below = shown(toSegment, toSegment.name);
    const about = found.regions.filter((region) => region.share > 0).map((region) => region.label).join(", ");
    const above = make("img", { alt: `Where it shows: ${about || "none of the labels"}`, id: "label-map" });
    above.src = `data:image/png;base64,${found.map}`;
    $("layers").replaceChildren(below, above);
    const rows = [...found.regions].sort((one, other) => other.share - one.share);
    if (found.unknown > 0.0005) rows.push({ label: "no label", share: found.unknown, color: "#808080" });
    $("legend").replaceChildren(
      ...rows.map(({ label, share, color }) => {
        const patch = make("span", { class: "patch", "aria-hidden": "true" });
        patch.style.background = color;
        return make("li", {}, patch, make("span", {}, label), make("span", { class: "score" }, `${(100 * share).toFixed(1)} %`));
      }),
    );
    fade();
    $("segmented").hidden = false;
    return `${plural(found.regions.filter((region) => region.share > 0).length, "label")} in`;
  });
}

function fade() {
  const map = $("label-map");
  if (map) map.style.opacity = Number($("segment-opacity").value) / 100;
}

function offerBackgrounds() {
  const chosen = $("segment-background").value;
  const labels = lines($("places"));
  $("segment-background").replaceChildren(
    make("option", { value: "" }, "no label does"),
    ...labels.map((label) => make("option", { value: label }, label)),
  );
  $("segment-background").value = labels.includes(chosen) ? chosen : "";
}

$("places").addEventListener("input", offerBackgrounds);
$("segment-opacity").addEventListener("input", fade);
$("segment-form").addEventListener("submit", (event) => {
  event.preventDefault();
  segment();
});
droppable($("segment-drop"), ([file]) => {
  toSegment = file;
  segment();
});
offerBackgrounds();

// --- few shots ---

let fitted = null;

function addClass() {
  const part = $("class-template").content.cloneNode(true).querySelector("fieldset");
  part.files = [];
  const thumbs = part.querySelector(".thumbs");
  droppable(part.querySelector(".drop"), (files) => {
    part.files.push(...files);
    thumbs.append(...files.map((file) => make("li", {}, shown(file, file.name))));
  });
  part.querySelector(".remove").addEventListener("click", () => {
    part.remove();
    count();
    $("add-class").focus();
  });
  $("classes").append(part);
  count();
  return part;
}

function count() {
  [...$("classes").children].forEach((part, place) => {
    part.querySelector("legend").textContent = `Class ${place + 1}`;
  });
}

$("add-class").addEventListener("click", () => addClass().querySelector("input[type=text]").focus());
$("fit-form").addEventListener("submit", (event) => {
  event.preventDefault();
  doing($("fit-form"), $("fit-status"), async () => {
    const parts = [...$("classes").children];
    const named = parts.map((part) => [part.querySelector("input[type=text]").value.trim(), part.files]);
    if (named.length < 2) throw new Error("Give at least two classes.");
    for (const [name, files] of named) {
      if (!files.length) throw new Error(`The class “${name}” has no pictures.`);
    }
    if (new Set(named.map(([name]) => name)).size < named.length) throw new Error("Two classes have one name.");
    const entries = named.flatMap(([name, files]) => files.map((file) => [name, file]));
    fitted = await call("fewshot", form(entries));
    $("try-form").hidden = false;
    $("tried").replaceChildren();
    const pictures = fitted.classes.reduce((sum, one) => sum + one.pictures, 0);
    return `Fitted to ${plural(pictures, "picture")} of ${fitted.classes.length} classes in`;
  });
});
$("try-form").addEventListener("submit", (event) => event.preventDefault());
droppable($("try-drop"), (files) =>
  doing($("try-form"), $("fit-status"), async () => {
    const found = await call(`fewshot/${fitted.id}`, form(files.map((file) => ["images", file])));
    answers($("tried"), files, found.pictures);
    return `${plural(files.length, "picture")} in`;
  }),
);

// --- tabs: arrows, Home and End move, as people who use a keyboard expect ---

const tabs = () => [...document.querySelectorAll("[role=tab]:not([hidden])")];

function open(tab, focus = false) {
  for (const other of document.querySelectorAll("[role=tab]")) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    other.tabIndex = chosen ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
  if (focus) tab.focus();
}

$("tabs").addEventListener("click", (event) => {
  const tab = event.target.closest("[role=tab]");
  if (tab) open(tab);
});
$("tabs").addEventListener("keydown", (event) => {
  const all = tabs();
  const place = all.indexOf(document.activeElement);
  const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: -1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  open(all.at(to % all.length), true);
});

// A file that misses its place must not replace the page.
for (const kind of ["dragover", "drop"]) window.addEventListener(kind, (event) => event.preventDefault());

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value);
  start();
});

async function start() {
  let about;
  try {
    about = await call("models");
  } catch (error) {
    $("about").textContent = error.message;
    return;
  }
  $("token-form").hidden = true;
  const [model] = about.data;
  const parts = [`Model ${model.id}, which sees ${model.image_size} × ${model.image_size} pixels.`];
  if (about.index) {
    parts.push(`The index holds ${plural(about.index.pictures, "picture")} and ${plural(about.index.texts, "text")}.`);
    const names = ["path", "width", "height", "size", "caption", ...Object.keys(about.index.fields)];
    $("search-fields").textContent = `Columns: ${names.join(", ")}.`;
  }
  $("about").textContent = parts.join(" ");
  for (const name of ["search", "classify", "segment", "fewshot"]) $(`tab-${name}`).hidden = !about.tasks.includes(name);
  if (!$("classes").children.length) for (const _ of [1, 2]) addClass();
  open(tabs().find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash) ?? tabs()[0]);
}

start();
