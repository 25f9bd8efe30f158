/* What the page does by itself: the heatmap's colours, the slider between image and heatmap, the false-alarm rate,
   downloads and paste. Results arrive as HTML (viewer.html.j2) with all that the controls need; nothing is asked of the
   server. `COLOURS` (six hexadecimal digits for each of 256 levels of each map) is set before this file. */

const chosen = { colours: "inferno", opacity: 70, outlines: true };

const of = (element) => element.closest(".result");
const all = (root, what) => [...root.querySelectorAll(what)];

/* ---- the heatmap -------------------------------------------------------------------------------------------------- */

function table(name) {
  const digits = COLOURS[name];
  return Array.from({ length: 256 }, (_, i) =>
    [0, 2, 4].map((k) => parseInt(digits.slice(6 * i + k, 6 * i + k + 2), 16)));
}

function gradient(name) {
  return `linear-gradient(90deg, ${table(name).filter((_, i) => i % 15 === 0).map((c) => `rgb(${c})`).join(", ")})`;
}

/* Levels, one byte a pixel, become colours; the hotter, the more opaque. */
function paint(result) {
  const canvas = result.querySelector(".heat"), context = canvas.getContext("2d"), levels = result.levels;
  const picture = context.createImageData(canvas.width, canvas.height), colours = table(chosen.colours);
  for (let i = 0, k = 0; i < levels.length; i++) {
    const colour = colours[levels[i]];
    picture.data[k++] = colour[0];
    picture.data[k++] = colour[1];
    picture.data[k++] = colour[2];
    picture.data[k++] = levels[i];
  }
  context.putImageData(picture, 0, 0);
  result.querySelector(".scale").style.background = gradient(chosen.colours);
}

async function begin(result) {
  result.dataset.begun = "1";
  const source = new Image();
  await new Promise((done, failed) => {
    [source.onload, source.onerror] = [done, () => failed(new Error("the levels can't be read"))];
    source.src = result.dataset.map;
  });
  const canvas = new OffscreenCanvas(source.naturalWidth, source.naturalHeight), context = canvas.getContext("2d");
  context.drawImage(source, 0, 0);
  result.levels = context.getImageData(0, 0, canvas.width, canvas.height).data.filter((_, i) => i % 4 === 0);
  result.querySelector(".colours").value = chosen.colours;
  result.querySelector(".opacity").value = chosen.opacity;
  result.querySelector(".outlines").checked = chosen.outlines;
  settle(result);
  paint(result);
  tell(result);
  const results = result.closest(".results");
  if (innerWidth < 760 && result === results.querySelector(".result"))  // on a phone it is below
    results.scrollIntoView({ behavior: "smooth", block: "start" });
}

/* A browser that is busy may fail to read the levels at first. */
function attempt(result, times = 5) {
  begin(result).catch((error) => {
    if (times && result.isConnected) setTimeout(attempt, 500, result, times - 1);
    else console.error(error);
  });
}

/* ---- controls ----------------------------------------------------------------------------------------------------- */

function settle(result) {
  result.querySelector(".stage").style.setProperty("--split", `${result.querySelector(".split").value}%`);
  result.querySelector(".heat").style.opacity = chosen.opacity / 100;
  result.querySelector(".opacity-out").textContent = `${chosen.opacity} %`;
  result.classList.toggle("plain", !chosen.outlines);
}

/* Say the answer to those who don't see it. */
function tell(result) {
  const answer = result.querySelector(".answer:not([hidden])");
  document.querySelector(".said").textContent = `${result.dataset.model}: ${answer.innerText}`;
}

function state(result, index, words) {
  all(result, "[data-rate]").forEach((part) => (part.toggleAttribute("hidden", part.dataset.rate !== index)));
  result.querySelector(".rate-out").textContent = words;
  result.querySelector(".rate").setAttribute("aria-valuetext", words);
  tell(result);
}

document.addEventListener("input", (event) => {
  const control = event.target, result = control.closest?.(".result");
  if (!result) return;
  if (control.matches(".rate")) {
    state(result, control.value, control.dataset.words.split("|")[control.value]);
  } else if (control.matches(".split")) {
    settle(result);
  } else {
    if (control.matches(".opacity")) chosen.opacity = Number(control.value);
    if (control.matches(".colours")) chosen.colours = control.value;
    if (control.matches(".outlines")) chosen.outlines = control.checked;
    all(document, ".result").forEach((each) => {
      each.querySelector(".colours").value = chosen.colours;
      each.querySelector(".opacity").value = chosen.opacity;
      each.querySelector(".outlines").checked = chosen.outlines;
      settle(each);
      if (each.levels && control.matches(".colours")) paint(each);
    });
  }
});

/* A row of the list of regions shows its outline. */
function mark(event, on) {
  const row = event.target.closest?.("tr[data-region]");
  if (!row) return;
  const rate = row.closest("[data-rate]").dataset.rate;
  all(of(row), `.lines[data-rate="${rate}"] [data-region="${row.dataset.region}"]`)
    .forEach((line) => line.classList.toggle("marked", on));
}
for (const [name, on] of [["mouseover", true], ["mouseout", false], ["focusin", true], ["focusout", false]])
  document.addEventListener(name, (event) => mark(event, on));

/* ---- downloads ---------------------------------------------------------------------------------------------------- */

/* The image with heatmap and outlines as they are shown, at the size of the picture in the page. */
async function overlay(result) {
  const image = result.querySelector(".image"), canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  context.globalAlpha = chosen.opacity / 100;
  context.drawImage(result.querySelector(".heat"), 0, 0, canvas.width, canvas.height);
  context.globalAlpha = 1;
  if (chosen.outlines) {
    const lines = result.querySelector(".lines:not([hidden])"), scale = canvas.width / result.dataset.width;
    context.setTransform(scale, 0, 0, canvas.height / result.dataset.height, 0, 0);
    context.strokeStyle = "#00d0ff";
    context.lineWidth = 1.6 / scale;
    all(lines, "path").forEach((path) => context.stroke(new Path2D(path.getAttribute("d"))));
    context.fillStyle = context.strokeStyle;
    for (const number of all(lines, "text")) {
      context.font = `bold ${number.getAttribute("font-size")}px sans-serif`;
      context.fillText(number.textContent, number.getAttribute("x"), number.getAttribute("y"));
    }
  }
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

document.addEventListener("click", async (event) => {
  if (!event.target.matches?.(".save-overlay")) return;
  const result = of(event.target), link = document.createElement("a");
  link.href = URL.createObjectURL(await overlay(result));
  link.download = `${result.dataset.file}-overlay.png`;
  link.click();
  URL.revokeObjectURL(link.href);
});

/* ---- paste, and drop anywhere ------------------------------------------------------------------------------------- */

const visible = (element) => element.checkVisibility();

/* Give files to the field of the tab that is shown; one that holds a file is cleared first. */
async function give(files) {
  const field = all(document, "#image, #compare-image, #batch-images, #normals").find(visible);
  if (!field || !files.length) return;
  field.querySelector("input[type=file]") ?? field.querySelector("button[aria-label=Clear]")?.click();
  for (let i = 0; i < 20 && !field.querySelector("input[type=file]"); i++) await new Promise((done) => setTimeout(done, 50));
  const input = field.querySelector("input[type=file]"), given = new DataTransfer();
  if (!input) return;
  (input.multiple ? files : files.slice(0, 1)).forEach((file) => given.items.add(file));
  input.files = given.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
}

document.addEventListener("paste", (event) => give([...event.clipboardData.files]));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  if (event.defaultPrevented) return;  // a field has taken it
  event.preventDefault();
  give([...event.dataTransfer.files]);
});

/* ---- results that arrive ------------------------------------------------------------------------------------------ */

new MutationObserver(() => all(document, ".result:not([data-begun])").forEach((result) => attempt(result)))
  .observe(document.documentElement, { childList: true, subtree: true });
