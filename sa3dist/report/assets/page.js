"use strict";
(() => {
  const { charts } = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Charts, drawn by uPlot in the page's colours.
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const short = (value) => {
    if (value == null) return "";
    const size = Math.abs(value);
    return size && (size < 1e-3 || size >= 1e6) ? value.toExponential(1) : String(+value.toPrecision(4));
  };
  const full = (value) => (value == null ? "–" : String(+value.toPrecision(5)));
  const drawn = new Map();

  function line(series, multiple) {
    const paint = colour(`--c${series.colour % 6}`);
    const made = { label: series.label, stroke: paint, width: 2, value: (_, value) => full(value), spanGaps: true };
    if (series.kind === "faint") Object.assign(made, { stroke: paint + "59", width: 1 });
    if (series.kind === "level") Object.assign(made, { dash: [6, 4], width: 1.5, points: { show: false } });
    if (series.kind === "mark") Object.assign(made, { paths: () => null, points: { show: true, size: 11, fill: paint } });
    if (series.kind === "bar") Object.assign(made, { fill: paint + "b3", width: 1, paths: uPlot.paths.bars({ size: [0.92, 200] }), points: { show: false } });
    return made;
  }

  function countsAbove(plot) {
    const { ctx } = plot;
    ctx.save();
    ctx.fillStyle = colour("--ink");
    ctx.font = `${10 * devicePixelRatio}px system-ui, sans-serif`;
    ctx.textAlign = "center";
    plot.data[1].forEach((count, i) => {
      if (count) ctx.fillText(count, plot.valToPos(plot.data[0][i], "x", true), plot.valToPos(count, "y", true) - 4 * devicePixelRatio);
    });
    ctx.restore();
  }

  function draw(figure) {
    const chart = charts[figure.dataset.chart];
    const holder = figure.querySelector(".plot");
    drawn.get(holder)?.destroy();
    const bars = chart.series[0].kind === "bar";
    const axis = { stroke: colour("--soft"), font: "12px system-ui, sans-serif", grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 } };
    const scales = { x: { time: false }, y: { distr: chart.log ? 3 : 1 } };
    const counts = bars ? { incrs: [1, 2, 5].flatMap((n) => [0, 1, 2, 3, 4, 5, 6].map((power) => n * 10 ** power)).sort((a, b) => a - b) } : {};
    if (bars) {
      scales.x.range = () => [chart.edges[0], chart.edges[chart.edges.length - 1]];
      scales.y.range = (_, low, high) => [0, Math.max(high, 1) * 1.15];
    }
    const x = { label: chart.x, value: (_, value) => full(value) };
    if (bars) x.value = (_, value, series, at) => (at == null ? "–" : `${short(chart.edges[at])} to ${short(chart.edges[at + 1])}`);
    const plot = new uPlot(
      {
        width: holder.clientWidth,
        height: 240,
        scales,
        hooks: bars ? { draw: [countsAbove] } : {},
        cursor: bars ? { drag: { x: false } } : { sync: { key: "steps" }, drag: { x: true } },
        axes: [
          { ...axis, label: chart.x, labelSize: 18, labelFont: axis.font, size: 34, values: (_, found) => found.map(short) },
          { ...axis, ...counts, size: 58, values: (_, found) => found.map((value) => (value == null ? "" : short(value))) },
        ],
        series: [x, ...chart.series.map((series) => line(series))],
      },
      uPlot.join(chart.series.map((series) => [series.x, series.y])),
      holder,
    );
    drawn.set(holder, plot);
  }

  const figures = all("[data-chart]");
  const drawAll = () => figures.forEach(draw);
  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  const widths = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) {
      const plot = drawn.get(target);
      if (plot && Math.abs(plot.width - contentRect.width) > 1) plot.setSize({ width: contentRect.width, height: 240 });
    }
  });
  figures.forEach((figure) => widths.observe(figure.querySelector(".plot")));
  all(".plot").forEach((holder) =>
    holder.addEventListener("keydown", (event) => {
      const plot = drawn.get(holder);
      const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
      if (!plot || !by) return;
      event.preventDefault();
      const steps = plot.data[0];
      const at = Math.min(Math.max((plot.cursor.idx ?? (by > 0 ? -1 : steps.length)) + by, 0), steps.length - 1);
      plot.setCursor({ left: plot.valToPos(steps[at], "x"), top: plot.over.clientHeight / 2 });
    }),
  );
  // For tests and debugging.
  window.sa3distCharts = () => Object.fromEntries(figures.map((figure) => [figure.dataset.chart, drawn.get(figure.querySelector(".plot")).data]));

  // Clips: one plays at a time. Another one of its row continues at the same position.
  const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
  const audioOf = (cell) => cell.querySelector(":scope > audio");
  const rowOf = (cell) => cell.closest("[data-row]") ?? cell;
  const cellsOf = (row) => all("[data-cell]", row).concat(row.matches("[data-cell]") ? [row] : []).filter(audioOf);
  const heard = new Map();
  let sounding = null;

  const secondsOf = (cell) => {
    const { duration } = audioOf(cell);
    return Number.isFinite(duration) ? duration : +cell.querySelector(":scope > .controls .time").dataset.seconds;
  };
  // A picture may show the whole clip while the player has only its beginning.
  const pictured = (picture, known) => +picture.dataset.whole || known;

  function show(cell) {
    const audio = audioOf(cell);
    const time = cell.querySelector(":scope > .controls .time");
    const known = secondsOf(cell);
    time.textContent = known ? `${clock(audio.currentTime)} / ${clock(known)}` : "";
    const head = cell.querySelector(":scope > .picture .head");
    if (head) {
      head.style.display = audio.currentTime ? "block" : "none";
      head.style.left = `${(100 * audio.currentTime) / (pictured(head.parentElement, known) || 1)}%`;
    }
    const button = cell.querySelector(":scope > .controls [data-play]");
    button.textContent = audio.paused ? "▶" : "❚❚";
    cell.classList.toggle("playing", !audio.paused);
  }

  function play(cell, from) {
    const audio = audioOf(cell);
    const row = rowOf(cell);
    const before = heard.get(row);
    let moment = from ?? (before && before !== cell ? audioOf(before).currentTime : audio.currentTime);
    if (sounding && sounding !== cell) audioOf(sounding).pause();
    if (before && before !== cell && audioOf(before).ended && from == null) moment = 0;
    heard.set(row, cell);
    if (!cell.classList.contains("base") && !cell.classList.contains("nearest")) row.other = cell;
    sounding = cell;
    audio.currentTime = moment;
    audio.play().catch(() => {
      cell.querySelector(":scope > .controls .time").textContent = "cannot be played";
    });
    cell.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  function tick() {
    if (sounding) show(sounding);
    if (sounding && !audioOf(sounding).paused) requestAnimationFrame(tick);
  }

  all("[data-cell]").filter(audioOf).forEach((cell) => {
    const audio = audioOf(cell);
    show(cell);
    audio.addEventListener("play", () => requestAnimationFrame(tick));
    for (const name of ["pause", "ended", "loadedmetadata", "seeked"]) audio.addEventListener(name, () => show(cell));
    cell.querySelector(":scope > .controls [data-play]").addEventListener("click", () => (audio.paused ? play(cell) : audio.pause()));
    cell.querySelector(":scope > [data-seek]")?.addEventListener("click", (event) => {
      const box = event.currentTarget.getBoundingClientRect();
      const known = secondsOf(cell);
      const moment = ((event.clientX - box.left) / box.width) * (pictured(event.currentTarget, known) || 0);
      play(cell, known ? Math.min(moment, Math.max(known - 1, 0)) : moment);
    });
  });

  all("[data-row]").forEach((row) => {
    const own = cellsOf(row).filter((cell) => !cell.classList.contains("nearest"));
    const base = own.find((cell) => cell.classList.contains("base"));
    const button = row.querySelector("[data-ab]");
    if (!base || own.length < 2) button.hidden = true;
    button.addEventListener("click", () => {
      const now = heard.get(row);
      play(now === base ? row.other ?? own[own.length - 1] : base);
    });
    row.addEventListener("keydown", (event) => {
      const cell = event.target.closest("[data-cell]");
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!cell || !by || !audioOf(cell)) return;
      event.preventDefault();
      if (event.shiftKey) {
        audioOf(cell).currentTime = Math.max(0, audioOf(cell).currentTime + by);
        return;
      }
      const next = own[own.indexOf(cell.closest(".cell")) + by];
      if (!next) return;
      next.querySelector("[data-play]").focus();
      if (sounding && rowOf(sounding) === row && !audioOf(sounding).paused) play(next);
    });
  });
  // Scroll to the newest column, which is the last.
  all(".grid").forEach((grid) => (grid.scrollLeft = grid.scrollWidth));

  // The picture of layers.
  all("[data-layers]").forEach((figure) => {
    const cells = all(".layer", figure).map((cell) => [cell, JSON.parse(cell.dataset.values)]);
    const said = figure.querySelector("[data-said]");
    const buttons = all("[data-figure]", figure);
    function choose(key) {
      // Drift matters by how far it is from 1.
      const size = (values) => (values[key] == null ? null : key === "drift" ? Math.abs(1 - values[key]) : values[key]);
      const sizes = cells.map(([, values]) => size(values)).filter((value) => value != null);
      const [low, high] = [Math.min(...sizes, 0), Math.max(...sizes, 0)];
      for (const [cell, values] of cells) cell.style.setProperty("--v", high > low ? ((size(values) ?? low) - low) / (high - low) : 0);
      buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.figure === key)));
    }
    const names = Object.fromEntries(buttons.map((button) => [button.dataset.figure, button.textContent]));
    for (const [cell, values] of cells) {
      const text = [values.name, ...Object.keys(names).filter((key) => values[key] != null).map((key) => `${names[key]} ${full(values[key])}`)].join(", ");
      cell.title = text;
      for (const name of ["mouseenter", "click"]) cell.addEventListener(name, () => (said.textContent = text));
    }
    buttons.forEach((button) => button.addEventListener("click", () => choose(button.dataset.figure)));
    if (buttons.length) choose(buttons[0].dataset.figure);
  });

  // Sortable tables: a column is sorted by number if all its cells have one.
  all("table.sortable").forEach((table) => {
    const rows = () => all(":scope > tbody > tr", table);
    all(":scope > thead th", table).forEach((head, at) => {
      if ("fixed" in head.dataset) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const falling = head.getAttribute("aria-sort") === "ascending";
        all("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", falling ? "descending" : "ascending");
        const key = (row) => row.cells[at]?.dataset.sort ?? row.cells[at]?.textContent.trim() ?? "";
        const sorted = rows().map((row) => [key(row), row]);
        const numbers = sorted.every(([text]) => text === "" || Number.isFinite(+text));
        sorted.sort(([a], [b]) => (numbers ? (a === "" ? -Infinity : +a) - (b === "" ? -Infinity : +b) : a.localeCompare(b)));
        if (falling) sorted.reverse();
        table.tBodies[0].append(...sorted.map(([, row]) => row));
      });
    });
  });

  // Rows are one line high: a click shows the whole text.
  all("[data-open]").forEach((button) => {
    const row = button.closest("tr");
    row.addEventListener("click", (event) => {
      if (event.target.closest(".listen") || (String(getSelection()) && event.detail)) return;
      button.setAttribute("aria-expanded", String(row.classList.toggle("open")));
    });
  });
  all(".line").forEach((line) => line.addEventListener("mouseenter", () => (line.title = line.textContent), { once: true }));

  // Ready: charts are drawn and controls work.
  requestAnimationFrame(() => performance.mark("usable"));
})();
