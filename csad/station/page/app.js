"use strict";

const SHOWN_ROWS = 200;   // of the list; the download has all
const KEPT_PICTURES = 40; // whose overlays can be looked at again
const FAR = 2;             // times the range of good scores and threshold: from there on a score stands at the bar's end
const BAR = { width: 1000, height: 90 };
const MAX_TRIES = 4;       // of a picture while the station is busy
const MAX_WAIT = 30;       // seconds between two of them, whatever the station asks for
const START_WAIT = 3;      // seconds until the station is asked again that does not answer
const NOT_INSPECTED = "not inspected"; // the station did not look at it
const WORDS = { normal: "Normal", anomalous: "Anomalous", undecided: "Undecided", unreadable: "Unreadable", [NOT_INSPECTED]: "Not inspected" };

const at = (id) => document.getElementById(id);
const models = new Map();     // name -> what /models says
const thresholds = new Map(); // name -> the threshold chosen here
const entries = [];           // answers of /score in order, oldest first
let model = null, shown = null, waiting = [], working = false, locked = false, stream = null, timer = 0;
let batch = [];     // entries since there was last nothing to do: what came together
let picked = false; // whether a person looks at one of the list meanwhile

async function ask(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const answer = await fetch(path, { ...options, headers: { ...(token && { Authorization: `Bearer ${token}` }), ...options.headers } });
  if (answer.status === 401) lock(Boolean(token));
  return answer;
}

function lock(wrong) {
  locked = true;
  sessionStorage.removeItem("token");
  at("token-form").hidden = false;
  at("links").hidden = true;
  at("token").focus();
  at("token").select();
  say(wrong ? "That token is wrong." : "Enter the station's token.", true);
}

async function start() {
  const answer = await ask("models").catch(() => null);
  if (answer?.status === 401) return;
  if (!answer?.ok) {
    say(`${answer ? await reasonOf(answer) : "The station does not answer"}; trying again …`, true);
    return setTimeout(start, 1000 * START_WAIT);
  }
  locked = false;
  at("token-form").hidden = true;
  at("links").hidden = false;
  for (const one of (await answer.json()).models) {
    models.set(one.name, one);
    if (!thresholds.has(one.name)) thresholds.set(one.name, one.threshold);
  }
  at("model").replaceChildren(...[...models.keys()].map((name) => new Option(name, name)));
  at("model-row").hidden = models.size < 2;
  choose(models.has(model?.name) ? model.name : [...models.keys()][0]);
  say("");
  work(); // what came before the models were known, or the token
}

function choose(name) {
  model = models.get(name);
  at("model").value = name;
  at("threshold").disabled = false;
  const parts = [models.size < 2 && model.name, model.runtime, model.precision, `${model.input_size} × ${model.input_size} pixels`];
  at("about").textContent = parts.filter(Boolean).join(" · ") + (model.has_maps ? "" : " · scores only: exported without maps");
  if (shown && shown.model !== name) shown = null;
  show(shown);
}

// Scoring

function take(files) {
  if (!files.length) return say("There is no picture in that.", true);
  waiting.push(...files);
  work();
}

async function work() {
  if (working) return;
  working = true;
  batch = [];
  picked = false;
  while (waiting.length && model && !locked) await score(waiting.shift());
  working = false;
}

// Every picture gets a row: with the station's verdict, or with the reason why there is none.
async function score(file, name = file.name || `picture-${stamp()}`) {
  say(`Looking at ${name}${waiting.length ? `, ${waiting.length} more to come` : ""} …`);
  const begun = performance.now(), asked = model.name;
  const answer = await answerOn(file, name, asked);
  if (!answer) return waiting.unshift(file); // until the token is right
  const entry = answer.entry ?? { image: name, verdict: answer.verdict, score: null, model: asked, findings: [answer.reason], problem: answer.reason };
  entry.time = new Date().toISOString();
  entries.push(entry);
  batch.push(entry);
  const worst = worstOf(batch.filter((other) => other.model === model.name)) ?? entry;
  const drawings = entries.filter((other) => other.overlay && other !== worst && other !== shown);
  if (drawings.length > KEPT_PICTURES) delete drawings[0].overlay;
  say(entry.verdict === NOT_INSPECTED ? "" : `${entry.image}: answered in ${Math.round(performance.now() - begun)} ms`);
  if (picked) return showList();
  if (worst.model !== model.name) return showList(); // the model was changed meanwhile
  show(worst);
}

// What has no score comes first: nobody knows whether it is good. Of the others the farthest over the threshold.
function worstOf(candidates) {
  const rank = (entry) => entry.score === null || entry.problem ? Infinity : entry.score - thresholds.get(entry.model);
  return candidates.reduce((worst, entry) => worst && rank(worst) >= rank(entry) ? worst : entry, undefined);
}

// {entry} from the station, {verdict, reason} without one, or null where a token is wanted.
async function answerOn(file, name, asked) {
  const missed = (reason) => ({ verdict: NOT_INSPECTED, reason }), unreadable = (reason) => ({ verdict: "unreadable", reason });
  if (!file.size) return unreadable("the file is empty (0 bytes)");
  let body;
  try {
    body = await file.arrayBuffer();
  } catch {
    return unreadable("the browser cannot read it: it is a folder, or it has been moved or changed");
  }
  const where = new URLSearchParams({ model: asked, name, overlay: 1 });
  for (let tries = 1; ; tries++) {
    try {
      const answer = await ask(`score?${where}`, { method: "POST", body, headers: { "Content-Type": "application/octet-stream" } });
      if (answer.ok) {
        const entry = await answer.json().catch(() => null);
        return entry?.verdict in WORDS ? { entry } : missed("the station's answer cannot be understood");
      }
      if (answer.status === 401) return null;
      const reason = await reasonOf(answer);
      if ([413, 415, 422].includes(answer.status)) return unreadable(reason);
      if (answer.status !== 503 || tries === MAX_TRIES) return missed(reason);
      const seconds = waitOf(answer);
      say(`The station is busy; ${name} is sent again in ${round(seconds)} s …`);
      await new Promise((done) => setTimeout(done, 1000 * seconds));
    } catch {
      return missed("the connection to the station failed");
    }
  }
}

// Seconds that Retry-After asks for, which may be a date.
function waitOf(answer) {
  const text = answer.headers.get("Retry-After")?.trim() || "1";
  const seconds = /^\d+(\.\d+)?$/.test(text) ? Number(text) : (Date.parse(text) - Date.now()) / 1000;
  return Math.min(MAX_WAIT, Math.max(0.1, Number.isFinite(seconds) ? seconds : 1));
}

async function reasonOf(answer) {
  const body = await answer.json().catch(() => null); // a proxy answers otherwise
  return body?.error ?? `the station answered with status ${answer.status}`;
}

// The verdict, by the threshold chosen here

const judged = (entry) => entry.score === null || entry.problem ? entry.verdict
  : entry.score > thresholds.get(entry.model) ? "anomalous" : "normal";

function findingsOf(entry) {
  if (entry.problem) return [entry.problem];
  return judged(entry) === "anomalous" ? entry.findings_if_anomalous ?? entry.findings : [];
}

const slug = (verdict) => verdict.replaceAll(" ", "-");

const round = (value, digits = 4) => Number(value.toPrecision(digits)).toString();

function show(entry) {
  shown = entry;
  showVerdict();
  showPictures();
  showList();
}

function showVerdict() {
  const verdict = shown ? judged(shown) : "waiting";
  at("verdict-card").dataset.verdict = slug(verdict);
  at("icon").setAttribute("href", `#icon-${slug(verdict)}`);
  setText("verdict", WORDS[verdict] ?? "No picture yet");
  setText("name", shown ? shown.image : "");
  at("batch").hidden = !shown || batch.length < 2 || !batch.includes(shown);
  setText("batch", picked ? `One of the ${batch.length} pictures that came together.`
    : `The worst of the ${batch.length} pictures that came together; the list below has the others, click one to see it.`);
  setText("note", shown?.note ? `${shown.note[0].toUpperCase()}${shown.note.slice(1)}.` : "");
  const findings = shown ? findingsOf(shown) : [];
  if (at("findings").innerText !== findings.join("\n")) at("findings").replaceChildren(...findings.map((text) => made("li", text)));
  showGauge();
}

function setText(id, text) { // what a screen reader reads aloud changes only where it is another
  if (at(id).textContent !== text) at(id).textContent = text;
}

function axis() {
  const values = [...model.validation_scores, model.threshold, thresholds.get(model.name)];
  const usual = Math.max(...values) - Math.min(...values) || 1;
  const far = [Math.min(...values) - FAR * usual, Math.max(...values) + FAR * usual];
  const scored = shown?.score ?? null;
  if (scored !== null) values.push(Math.min(far[1], Math.max(far[0], scored))); // farther ones stand at the end
  const low = Math.min(...values), high = Math.max(...values), margin = (high - low || 1) * 0.06;
  return [low - margin, high + margin];
}

function showGauge(keepAxis = false) {
  if (!model) return;
  const threshold = thresholds.get(model.name), slider = at("threshold");
  const [low, high] = keepAxis ? [Number(slider.min), Number(slider.max)] : axis();
  Object.assign(slider, { min: low, max: high, step: (high - low) / 1000 });
  slider.value = threshold;
  slider.setAttribute("aria-valuetext", round(threshold));
  const place = (value) => Math.max(0, Math.min(1, (value - low) / (high - low))) * BAR.width;
  const bar = [drawn("rect", { class: "over", x: place(threshold), y: 0, width: BAR.width - place(threshold), height: BAR.height }),
    drawn("line", { class: "ground", x1: 0, x2: BAR.width, y1: BAR.height, y2: BAR.height }),
    ...model.validation_scores.map((value) => stroke("good", place(value), 55, BAR.height))];
  if (shown && shown.score !== null) bar.push(stroke("mark", place(shown.score), 22, BAR.height));
  bar.push(stroke("threshold", place(threshold), 0, BAR.height));
  at("bar").replaceChildren(at("bar").querySelector("title"), ...bar);
  showAxis(low, high, place(threshold) / BAR.width);
  const scored = shown && shown.score !== null;
  at("score-words").textContent = scored ? `Score ${round(shown.score)} ${shown.score > threshold ? "is over" : "is not over"} the threshold ${round(threshold)}` : "";
  at("bar-words").textContent = scored ? at("score-words").textContent : `Threshold ${round(threshold)}`;
  const own = threshold !== model.threshold;
  at("threshold-words").textContent = own ? `Threshold ${round(threshold)}, set here` : `Threshold ${round(threshold)}`;
  at("reset").hidden = !own;
  at("promise").textContent = own ? promise(threshold) : `${model.threshold_words}.`.replace(/^./, (letter) => letter.toUpperCase());
}

// The numbers under the bar: its ends, and the threshold under its line; an end that this would cover is left out.
function showAxis(low, high, share) {
  setText("axis-low", share < 0.2 ? "" : round(low, 3));
  const beyond = shown && shown.score !== null && shown.score > high;
  setText("axis-high", beyond ? `${round(shown.score, 3)} →` : share > 0.8 ? "" : round(high, 3));
  setText("axis-threshold", round(thresholds.get(model.name)));
  at("axis-threshold").style.left = `${100 * share}%`;
  at("axis-threshold").style.transform = `translateX(${-100 * share}%)`; // stays within the bar
}

// csad/evaluation/thresholds.py, choose_threshold: the k-th smallest of n scores of good pictures promises 1 - k / (n + 1).
function promisedRate(threshold, scores) {
  return 1 - scores.filter((score) => score <= threshold).length / (scores.length + 1);
}

function promise(threshold) {
  const count = model.validation_scores.length;
  if (!count) return "The model does not know its validation pictures' scores, so nothing is promised.";
  return `${rejected(promisedRate(threshold, model.validation_scores))} may be rejected. The station and its log keep ${round(model.threshold)}.`;
}

// As csad/evaluation/thresholds.py counts.
function rejected(share) {
  if (share >= 1) return "Every good part";
  const of = Math.round(1 / share);
  if (of >= 10 || Math.abs(of * share - 1) < 0.02) return `About 1 good part in ${of}`;
  return `About ${Math.round(100 * share)} good parts in 100`;
}

// Pictures

async function showPictures() {
  const entry = shown;
  at("pictures").hidden = !entry?.overlay;
  if (!entry?.overlay) return;
  at("legend").replaceChildren(...(entry.legend ?? []).map((one) => {
    const item = made("span"), swatch = made("i");
    swatch.style.background = one.colour;
    item.append(swatch, one.title.endsWith(` ${one.component}`) ? one.title : `${one.component} ${one.title}`);
    return item;
  }));
  const strip = new Image();
  strip.src = entry.overlay;
  await strip.decode();
  if (entry !== shown) return;
  // report/pictures.py, side_by_side: three of one size, a gap between them.
  const height = strip.naturalHeight, gap = Math.max(4, Math.floor(height / 64)), width = (strip.naturalWidth - 2 * gap) / 3;
  ["picture", "components", "map"].forEach((id, index) => {
    Object.assign(at(id), { width, height });
    at(id).getContext("2d").drawImage(strip, index * (width + gap), 0, width, height, 0, 0, width, height);
  });
}

function enlarge(canvas) {
  const large = at("large-picture");
  Object.assign(large, { width: canvas.width, height: canvas.height });
  large.style.width = `${Math.min(window.innerWidth * 0.92, 0.82 * window.innerHeight * canvas.width / canvas.height)}px`;
  large.getContext("2d").drawImage(canvas, 0, 0);
  at("large").showModal();
}

// The list

function showList() {
  const counts = { normal: 0, anomalous: 0, undecided: 0, unreadable: 0, [NOT_INSPECTED]: 0 };
  for (const entry of entries) counts[judged(entry)] += 1;
  if (!counts[NOT_INSPECTED]) delete counts[NOT_INSPECTED];
  at("counts").replaceChildren(...Object.entries(counts).map(([verdict, count]) => pill(verdict, `${count} ${verdict}`)));
  at("list").replaceChildren(...entries.slice(-SHOWN_ROWS).reverse().map(row));
  for (const id of ["csv", "jsonl", "clear"]) at(id).disabled = !entries.length;
  at("list-hint").textContent = (entries.length ? entries.length > SHOWN_ROWS ? `The newest ${SHOWN_ROWS} of ${entries.length}; downloads have all. ` : ""
    : "Nothing has been inspected. ") + "Verdicts here follow the threshold above; the list lives in this page and is gone when it is closed.";
}

function row(entry) {
  const verdict = judged(entry), line = made("tr"), again = made("button", entry.image);
  line.classList.toggle("shown", entry === shown);
  again.type = "button";
  again.addEventListener("click", () => { picked = true; if (models.size > 1) { shown = entry; choose(entry.model); } else show(entry); at("result").focus(); });
  const cells = [pill(verdict, verdict), again, entry.model, entry.score === null ? "–" : round(entry.score), round(thresholds.get(entry.model)), findingsOf(entry).join("; ")];
  line.append(...cells.map((content, index) => {
    const cell = made("td");
    cell.className = ["", "", "wide", "number", "number wide", "wide"][index];
    cell.append(content);
    return cell;
  }));
  return line;
}

function pill(verdict, text) {
  const found = made("span"), icon = drawn("svg", { "aria-hidden": "true" });
  found.className = `pill ${slug(verdict)}`;
  icon.append(drawn("use", { href: `#icon-${slug(verdict)}` }));
  found.append(icon, text);
  return found;
}

const exported = () => entries.map(({ overlay, legend, findings_if_anomalous, ...entry }) =>
  ({ ...entry, station_verdict: entry.verdict, verdict: judged(entry), threshold: thresholds.get(entry.model), findings: findingsOf({ ...entry, findings_if_anomalous }) }));

function asCsv() {
  const branches = [...new Set([...models.values()].flatMap((one) => one.branches))];
  // Spreadsheets take text that begins like this for a formula; an apostrophe makes it text.
  const plain = (value) => typeof value === "string" && /^[=+\-@\t\r\n＝＋－＠]/.test(value) ? `'${value}` : String(value ?? "");
  const quoted = (value) => /[",\n\r]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value;
  const rows = exported().map((one) => [one.time, one.model, one.image, one.verdict, one.score, one.threshold,
    ...branches.map((branch) => one.contributions?.[branch]), ...(one.unusual ?? [null, null]), one.findings.join("; ")]);
  const columns = ["time", "model", "image", "verdict", "score", "threshold", ...branches.map((branch) => `${branch}_contribution`), "unusual_x", "unusual_y", "findings"];
  return [columns, ...rows].map((cells) => cells.map((cell) => quoted(plain(cell))).join(",") + "\n").join("");
}

function download(text, kind, ending) {
  const link = made("a");
  link.href = URL.createObjectURL(new Blob([text], { type: kind }));
  link.download = `predictions-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}.${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// Camera

async function toggleCamera() {
  clearTimeout(timer);
  if (stream) {
    for (const track of stream.getTracks()) track.stop();
    stream = null;
    at("every").checked = false;
  } else if (!navigator.mediaDevices?.getUserMedia) {
    return say("Browsers open the camera only for https and for this machine itself; on a phone, “Choose pictures” offers its camera.", true);
  } else {
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 1920 } } });
    } catch (problem) {
      return say(`The camera cannot be used: ${problem.message}.`, true);
    }
    at("video").srcObject = stream;
    await at("video").play();
  }
  at("video").hidden = at("camera-controls").hidden = !stream;
  at("camera").setAttribute("aria-pressed", String(Boolean(stream)));
  at("camera").textContent = stream ? "Camera off" : "Camera";
}

async function shoot() {
  const video = at("video"), canvas = made("canvas");
  Object.assign(canvas, { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  const content = await new Promise((done) => canvas.toBlob(done, "image/png"));
  waiting.push(new File([content], `camera-${stamp()}.png`));
  await work();
}

async function repeat() {
  clearTimeout(timer);
  if (!stream || !at("every").checked) return;
  const begun = performance.now();
  if (!working && !waiting.length) await shoot(); // a picture that would only wait is not taken
  if (!stream || !at("every").checked) return;
  const seconds = Math.max(0.2, Number(at("seconds").value) || 5);
  clearTimeout(timer);
  timer = setTimeout(repeat, Math.max(0, 1000 * seconds - (performance.now() - begun)));
}

// Small things

const stamp = () => new Date().toISOString().slice(0, 23).replaceAll(":", "");

function say(text, wrong = false) {
  setText("progress", text);
  at("progress").classList.toggle("wrong", wrong);
  showMissed();
}

// What was not inspected is said as long as the list holds it.
function showMissed() {
  const missed = entries.filter((entry) => entry.verdict === NOT_INSPECTED), last = missed.at(-1);
  setText("missed", last ? `${missed.length} of ${entries.length} ${entries.length === 1 ? "picture" : "pictures"} not inspected, the last one ${last.image}: ${last.problem}.` : "");
}

async function showText(link) {
  const answer = await ask(link.getAttribute("href")).catch(() => null);
  if (!answer?.ok) return answer?.status === 401 || say(answer ? `${await reasonOf(answer)}.` : "The station does not answer.", true);
  const text = await answer.text(), json = answer.headers.get("Content-Type")?.startsWith("application/json");
  at("text-title").textContent = link.textContent;
  at("text-content").textContent = json ? JSON.stringify(JSON.parse(text), null, 2) : text;
  at("text").showModal();
}

function made(tag, text = "") {
  const found = document.createElement(tag);
  found.textContent = text;
  return found;
}

function drawn(tag, attributes) {
  const found = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) found.setAttribute(name, value);
  return found;
}

const stroke = (kind, x, top, bottom) => drawn("line", { class: kind, x1: x, x2: x, y1: top, y2: bottom });

at("file").addEventListener("change", (event) => { take(event.target.files); event.target.value = ""; });
at("model").addEventListener("change", (event) => choose(event.target.value));
at("camera").addEventListener("click", toggleCamera);
at("shoot").addEventListener("click", shoot);
for (const id of ["every", "seconds"]) at(id).addEventListener("change", repeat);
at("threshold").addEventListener("input", (event) => {
  thresholds.set(model.name, Number(event.target.value));
  const verdict = at("verdict-card").dataset.verdict;
  if (shown && slug(judged(shown)) !== verdict) showVerdict();
  showGauge(true);
});
at("threshold").addEventListener("change", showList);
at("reset").addEventListener("click", () => { thresholds.set(model.name, model.threshold); show(shown); at("threshold").focus(); });
at("csv").addEventListener("click", () => download(asCsv(), "text/csv", "csv"));
at("jsonl").addEventListener("click", () => download(exported().map((one) => JSON.stringify(one) + "\n").join(""), "application/jsonl", "jsonl"));
at("clear").addEventListener("click", () => { entries.length = 0; batch = []; say(""); show(null); at("file").focus(); });
at("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = at("token").value.trim();
  if (!/^[!-~]+$/.test(token)) return lock(true); // no header can carry it
  sessionStorage.setItem("token", token);
  start();
});
for (const link of at("links").querySelectorAll("a")) link.addEventListener("click", (event) => { event.preventDefault(); showText(link); });
for (const button of document.querySelectorAll(".zoom")) button.addEventListener("click", () => enlarge(button.querySelector("canvas")));
document.addEventListener("paste", (event) => { // browsers call every copied picture image.png
  const files = [...event.clipboardData.files].map((file) => file.name === "image.png" ? new File([file], `pasted-${stamp()}.png`) : file);
  if (files.length) take(files);
});
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dragging"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dragging"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  take(event.dataTransfer.files);
});
start();
