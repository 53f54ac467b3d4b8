"use strict";
(() => {
  const KEY = "sa3dist-key";
  const LOOK_SECONDS = 1.5;
  const PAGE_JOBS = 50;
  const MOST_JOBS = 500;
  const MOST_LINES = 2000;
  const FIRST_FIELDS = ["audio_data_url", "model", "number_of_steps", "rank", "learning_rate"];
  const WHOLE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000];
  const WORDS = { QUEUED: "waiting", RUNNING: "running", SUCCEEDED: "done", FAILED: "failed", CANCELLED: "cancelled" };
  // Two fields accept fewer values here than in the trainer.
  const SAID = { audio_data_url: ["or its address", "http(s), or a file that is here already"], model: ["model", "the base to train on"] };
  const $ = (id) => document.getElementById(id);
  // Data from the server is inserted as text, never as markup.
  const say = (node, text) => void (node.textContent !== text && (node.textContent = text));
  const make = (name, values = {}, ...inside) => {
    const node = Object.assign(document.createElement(name), values);
    node.append(...inside);
    return node;
  };

  let about = null;
  let shown = null; // {id, job, logs_at, attempt, rows_at, rows, plot} of the open job
  let wanted = PAGE_JOBS;
  let file = null; // the dropped or chosen file
  let stored = null; // {file, url} of the last upload: it is not uploaded again if the request is refused

  // Requests to the server.
  const headers = () => {
    const key = sessionStorage.getItem(KEY);
    return key ? { Authorization: `Key ${key}` } : {};
  };

  async function ask(address, method = "GET", body) {
    const words = { method, headers: headers(), cache: "no-store" };
    if (body !== undefined) Object.assign(words, { body: JSON.stringify(body), headers: { ...words.headers, "Content-Type": "application/json" } });
    const answer = await fetch(address, words);
    const said = await answer.json().catch(() => ({}));
    if (answer.ok) return said;
    if (answer.status === 401) enter("This key is not, or no longer, valid.");
    throw Object.assign(new Error(said.message ?? answer.statusText), { status: answer.status, detail: said.detail });
  }

  const jobRoute = (job) => `${job.app}/requests/${job.id}`;

  // Texts.
  const number = (value) => (value == null ? "–" : String(+value.toPrecision(4)));
  function span(seconds) {
    if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
    if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
    return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
  }
  function standing(job) {
    const parts = [];
    if (job.state === "QUEUED") parts.push(job.queue_position ? `${job.queue_position} before it` : "next");
    if (job.state === "RUNNING" && job.stage && job.stage !== "train") parts.push(job.stage);
    if (job.step || job.state === "RUNNING") parts.push(`step ${job.step} of ${job.steps}`);
    if (job.stopping) parts.push("saving and ending");
    else if (job.eta_seconds != null) parts.push(`${span(job.eta_seconds)} left`);
    if (job.finished && job.started) parts.push(`took ${span(job.finished - job.started)}`);
    if (job.attempts > 1) parts.push(`attempt ${job.attempts}`);
    if (about.is_admin && about.needs_key) parts.push(job.key);
    return parts.join(" · ");
  }
  const stateOf = (node, job) => {
    say(node, job.stopping ? "ending" : WORDS[job.state]);
    node.dataset.state = job.state;
  };
  const filled = (bar, job) => Object.assign(bar, { max: job.steps, value: job.step });

  // The list.
  const rows = new Map();
  function row(job) {
    const node = make("a", { href: `#${job.id}` }, make("b"), make("span", { className: "state" }), make("progress"), make("small"));
    return make("li", {}, node);
  }
  function showList({ jobs, before }) {
    const list = $("list");
    const ids = new Set(jobs.map((job) => job.id));
    for (const [id, node] of rows) if (!ids.has(id)) (node.remove(), rows.delete(id));
    jobs.forEach((job, at) => {
      if (!rows.has(job.id)) rows.set(job.id, row(job));
      const node = rows.get(job.id);
      if (list.children[at] !== node) list.insertBefore(node, list.children[at] ?? null);
      const [link] = node.children;
      const [name, state, bar, small] = link.children;
      say(name, job.name);
      stateOf(state, job);
      filled(bar, job).hidden = job.state !== "RUNNING";
      say(small, [standing(job), new Date(1000 * job.created).toLocaleString()].filter(Boolean).join(" · "));
      shown?.id === job.id ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
    });
    $("none").hidden = jobs.length > 0;
    $("older").hidden = before == null || wanted >= MOST_JOBS;
  }

  // One job.
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  function showJob(job) {
    shown.job = job;
    say($("job-title"), job.name);
    stateOf(document.querySelector("#job .state"), job);
    say($("job-said"), [standing(job), job.error].filter(Boolean).join(" · "));
    filled($("job-progress"), job).hidden = job.state !== "RUNNING";
    const over = !["QUEUED", "RUNNING"].includes(job.state);
    $("cancel").hidden = over || job.stopping;
    $("delete").hidden = !over;
    $("report").hidden = !job.report_url;
    if (job.report_url) $("report").href = here(job.report_url);
    // The following changes only with the job itself.
    if (shown.updated === job.updated) return;
    shown.updated = job.updated;
    say($("job-id"), job.id);
    $("job-problems").replaceChildren(...job.problems.map((one) => make("li", {}, `${one.loc.slice(1).join(".")}: ${one.msg}`)));
    const files = Object.values(job.result ?? {}).filter((value) => value?.url);
    $("files").replaceChildren(...files.map((value) => make("li", {}, make("a", { href: here(value.url), download: "" }, value.file_name ?? "file"))));
    const words = Object.entries(job.request).map(([name, value]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, typeof value === "string" ? value : JSON.stringify(value))));
    $("request").replaceChildren(...words);
  }
  // Links to results always lead to this server.
  const here = (address) => {
    const { pathname, search } = new URL(address, location.href);
    return pathname + search;
  };
  function showProgress(more) {
    const log = $("log");
    if (more.logs.length) {
      const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      log.append(...more.logs.map((line) => make("div", { title: line.timestamp }, line.message)));
      while (log.childElementCount > MOST_LINES) log.firstChild.remove();
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
    if (more.begins) shown.rows = [];
    Object.assign(shown, { logs_at: more.logs_at, attempt: more.attempt, rows_at: more.rows_at });
    if (!more.rows.length && !more.begins) return;
    shown.rows.push(...more.rows);
    draw();
  }
  function draw() {
    if (!shown) return;
    const [steps, losses, validations] = [0, 1, 2].map((at) => shown.rows.map((values) => values[at]));
    const last = shown.rows.findLast((values) => values[1] != null);
    $("loss").hidden = !shown.rows.length;
    if (!last && !shown.rows.length) return;
    say($("loss-said"), last ? `${number(last[1])} at step ${last[0]}` : "");
    const validated = validations.some((value) => value != null);
    const data = [steps, losses, ...(validated ? [validations] : [])];
    if (shown.plot && shown.validated === validated) return shown.plot.setData(data);
    shown.plot?.destroy();
    shown.validated = validated;
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 } };
    const value = (_, found) => number(found);
    const lines = [
      { label: "training", stroke: colour("--accent"), width: 1.5, value, spanGaps: true },
      ...(validated ? [{ label: "validation", stroke: colour("--c1"), width: 2, value, spanGaps: true }] : []),
    ];
    const options = { width: $("plot").clientWidth, height: 200, scales: { x: { time: false } }, axes: [{ ...axis, incrs: WHOLE }, { ...axis, size: 56 }], series: [{ label: "step" }, ...lines] };
    shown.plot = new uPlot(options, data, $("plot"));
  }
  function redraw() {
    shown?.plot?.destroy();
    if (shown) shown.plot = null;
    draw();
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  new ResizeObserver(([{ contentRect }]) => {
    if (shown?.plot && Math.abs(shown.plot.width - contentRect.width) > 1) shown.plot.setSize({ width: contentRect.width, height: 200 });
  }).observe($("plot"));

  $("cancel").addEventListener("click", () => act("Cancel this job? A running one saves first.", "PUT", "/cancel"));
  $("delete").addEventListener("click", () => act("Delete this job with all its files?", "DELETE", ""));
  async function act(question, method, more) {
    const job = shown?.job;
    if (!job || !confirm(question)) return;
    try {
      await ask(jobRoute(job) + more, method);
      if (method === "DELETE") location.hash = "";
      else await look();
    } catch (failure) {
      notice(failure.message);
    }
  }
  $("again").addEventListener("click", () => {
    const request = shown?.job?.request;
    if (!request) return;
    fill(request);
    location.hash = "new";
  });

  // The form, generated from the server's description of the fields.
  function field(name, schema) {
    const kind = schema.anyOf?.find((one) => one.type !== "null") ?? schema;
    const choices = name === "model" ? about.models : kind.enum;
    const id = `field-${name}`;
    const usual = schema.default ?? null;
    let input;
    if (kind.type === "boolean") input = make("select", {}, make("option", { value: "" }, `${usual ? "yes" : "no"}, as usual`), make("option", { value: String(!usual) }, usual ? "no" : "yes"));
    else if (choices) input = make("select", {}, make("option", { value: "" }, `${usual}, as usual`), ...choices.filter((one) => one !== usual).map((one) => make("option", { value: one }, one)));
    else input = make("input", { placeholder: usual == null ? "" : String(usual), autocomplete: "off", spellcheck: false, inputMode: ["integer", "number"].includes(kind.type) ? "decimal" : "text" });
    Object.assign(input, { id, name });
    input.dataset.kind = kind.type;
    input.setAttribute("aria-describedby", `${id}-about`);
    const [label, text] = SAID[name] ?? [name.replaceAll("_", " "), schema.description ?? ""];
    const wide = kind.type === "array" || name.endsWith("_url");
    return make("div", { className: wide ? "field wide" : "field" }, make("label", { htmlFor: id }, label), input, make("small", { id: `${id}-about` }, kind.type === "array" ? `${text}; commas between` : text));
  }
  const inputs = () => Object.keys(about.fields).map((name) => $(`field-${name}`));
  function makeForm() {
    const made = (name) => field(name, about.fields[name]);
    $("fields").replaceChildren(...FIRST_FIELDS.map(made));
    const others = Object.keys(about.fields).filter((name) => !FIRST_FIELDS.includes(name));
    $("more").lastElementChild.replaceChildren(...others.map(made));
  }
  function read(input) {
    const text = input.value.trim();
    if (input.dataset.kind === "boolean") return text === "true";
    if (input.dataset.kind === "array") return text.split(",").map((word) => word.trim());
    return ["integer", "number"].includes(input.dataset.kind) && Number.isFinite(+text) ? +text : text;
  }
  function fill(request) {
    choose(null);
    for (const input of inputs()) {
      const value = request[input.name];
      input.value = value == null ? "" : Array.isArray(value) ? value.join(", ") : String(value);
      // The first choice is the default.
      if (input.value === "" && input.tagName === "SELECT") input.selectedIndex = 0;
      if (input.value && input.closest("#more")) $("more").open = true;
    }
    refuse([]);
  }
  function refuse(problems) {
    for (const input of inputs()) input.removeAttribute("aria-invalid");
    $("problems").replaceChildren(...problems.map((one) => make("li", {}, [one.loc?.slice(1).join("."), one.msg].filter(Boolean).join(": "))));
    for (const one of problems) {
      const input = $(`field-${one.loc?.[1]}`);
      input?.setAttribute("aria-invalid", "true");
      if (input?.closest("#more")) $("more").open = true;
    }
    document.querySelector("#form [aria-invalid]")?.focus();
  }

  function choose(chosen) {
    file = chosen;
    // The file input does not show a dropped file.
    if (chosen !== $("file").files[0]) $("file").value = "";
    if (chosen) $("field-audio_data_url").value = "";
    say($("chosen"), chosen ? `${chosen.name}, ${number(chosen.size / 1e6)} MB` : "Each clip beside a text file of the same name, or a JSON file for all.");
  }
  $("file").addEventListener("change", () => $("file").files[0] && choose($("file").files[0]));
  for (const name of ["dragover", "drop", "dragleave"])
    document.addEventListener(name, (event) => {
      // Anywhere on the page: otherwise the browser would open a dropped file.
      if (name !== "dragleave") event.preventDefault();
      $("drop").classList.toggle("over", name === "dragover");
      if (name !== "drop" || !event.dataTransfer?.files.length || !about || $("form").inert) return;
      choose(event.dataTransfer.files[0]);
      location.hash = "new";
    });

  // XMLHttpRequest, because fetch has no upload progress.
  const send = (address, data, told) =>
    new Promise((done, fail) => {
      const request = new XMLHttpRequest();
      request.open("PUT", address);
      for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
      request.upload.onprogress = (event) => event.lengthComputable && told(event.loaded / event.total);
      request.onerror = () => fail(new Error("The file could not be sent: no connection to the server."));
      request.onload = () => {
        if (request.status < 300) return done();
        let said = {};
        try { said = JSON.parse(request.responseText); } catch { said.message = request.statusText; }
        fail(new Error(said.message ?? request.statusText));
      };
      request.send(data);
    });
  async function upload(chosen) {
    if (stored?.file === chosen) return stored.url;
    const { upload_url, file_url } = await ask("rest/storage/upload/initiate", "POST", { file_name: chosen.name, content_type: chosen.type || "application/zip" });
    const bar = $("sending").querySelector("progress");
    bar.value = 0;
    $("sending").hidden = false;
    try {
      await send(here(upload_url), chosen, (share) => (bar.value = share));
    } finally {
      $("sending").hidden = true;
    }
    stored = { file: chosen, url: file_url };
    return file_url;
  }
  $("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    refuse([]);
    const form = $("form");
    form.inert = true;
    try {
      const request = Object.fromEntries(inputs().filter((input) => input.value.trim()).map((input) => [input.name, read(input)]));
      if (file) request.audio_data_url = await upload(file);
      const { request_id } = await ask(about.app, "POST", request);
      fill({});
      location.hash = request_id;
    } catch (failure) {
      // First, because an inert element cannot take the focus.
      form.inert = false;
      refuse(Array.isArray(failure.detail) ? failure.detail : [{ msg: failure.message }]);
    } finally {
      form.inert = false;
    }
  });

  // The caller's key.
  const notice = (text) => say($("notice"), text);
  function enter(text = "") {
    sessionStorage.removeItem(KEY);
    about = null;
    close();
    document.querySelector("main").hidden = $("leave").hidden = true;
    $("enter").hidden = false;
    say($("who"), "");
    notice(text);
    $("key").focus();
  }
  $("enter").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = $("key").value.trim();
    $("key").value = "";
    // Headers cannot contain other characters.
    if (!/^[\x21-\x7e]+$/.test(key)) return notice("That is no key.");
    sessionStorage.setItem(KEY, key);
    begin();
  });
  $("leave").addEventListener("click", () => enter("The key is forgotten."));
  async function begin() {
    let known;
    try {
      known = await ask("api/about");
    } catch (failure) {
      return notice(failure.message);
    }
    say($("version"), known.version);
    if (known.caller == null) return enter(sessionStorage.getItem(KEY) ? "This key is not valid." : "");
    about = known;
    notice("");
    say($("who"), known.needs_key ? `${known.caller}${known.is_admin ? ", sees everybody's jobs" : ""}` : "no key needed on this machine");
    $("leave").hidden = !known.needs_key;
    $("enter").hidden = true;
    document.querySelector("main").hidden = false;
    makeForm();
    go();
  }

  // The current view: #, #new or #<id of a job>.
  function close() {
    shown?.plot?.destroy();
    shown = null;
    for (const id of ["plot", "log", "job-problems", "files", "request"]) $(id).replaceChildren();
    for (const id of ["job-title", "job-said"]) say($(id), "");
    for (const id of ["cancel", "delete", "report", "loss"]) $(id).hidden = true;
  }
  function go() {
    if (!about) return;
    close();
    const place = location.hash.slice(1);
    const view = place === "new" ? "new" : /^[0-9a-f]{32}$/.test(place) ? "job" : "list";
    document.body.dataset.view = view;
    $("new").hidden = view === "job";
    $("job").hidden = view !== "job";
    if (view === "job") shown = { id: place, logs_at: 0, attempt: 0, rows_at: 0, rows: [] };
    $({ new: "new-title", job: "job-title", list: "jobs-title" }[view]).focus({ preventScroll: view === "list" });
    look();
  }
  addEventListener("hashchange", go);
  $("older").addEventListener("click", () => {
    wanted = Math.min(wanted + PAGE_JOBS, MOST_JOBS);
    look();
  });

  let away = false;
  async function look() {
    try {
      await readAll();
      if (away) notice("");
      away = false;
    } catch (failure) {
      away = true;
      if (about) notice(failure.status ? failure.message : "No connection to the server; trying again.");
    }
  }
  async function readAll() {
    const [open, who] = [shown, about];
    const still = () => about === who && shown === open;
    const jobs = await ask(`api/jobs?limit=${wanted}`);
    if (still()) showList(jobs);
    // Two requests at a time would get the same lines.
    if (!open || !still() || open.looking) return;
    open.looking = true;
    try {
      const job = await ask(`api/jobs/${open.id}`);
      const more = await ask(`api/jobs/${open.id}/progress?logs_at=${open.logs_at}&attempt=${open.attempt}&rows_at=${open.rows_at}`);
      if (!still()) return;
      showJob(job);
      showProgress(more);
    } catch (failure) {
      if (failure.status !== 404 || !still()) throw failure;
      location.hash = "";
      notice("There is no such job, or it is not yours.");
    } finally {
      open.looking = false;
    }
  }
  async function keepLooking() {
    if (about && !document.hidden) await look();
    setTimeout(keepLooking, 1000 * LOOK_SECONDS);
  }
  begin().finally(keepLooking);
})();
