"use strict";

// Elements. Names from the data are always set as text, never as HTML.

function h(tag, attributes, ...children) {
  const svg = ["svg", "rect", "image", "text", "title"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

const table = (rows, kind) => h("div", {class: "scroll"}, h("table", {class: kind},
  h("thead", {}, h("tr", {}, rows[0].map((cell) => h("th", {scope: "col"}, cell)))),
  h("tbody", {}, rows.slice(1).map((row) => h("tr", {}, row.map((cell) => h("td", {}, cell)))))));

const percent = (value) => `${(100 * value).toFixed(1)} %`;
const number = (value, digits = 3) => (value === null || value === undefined ? "-" : value.toFixed(digits));
const shortest = (value) => { // the shortest decimal number with the same fp32 value
  for (let digits = 1; digits < 9; digits++) if (Math.fround(+value.toPrecision(digits)) === Math.fround(value)) return String(+value.toPrecision(digits));
  return String(+value.toPrecision(9));
};
const PALETTE = ["#2b6cb0", "#00838f", "#6b46c1", "#b7791f", "#97266d", "#4a5568"];

function shareBar(shares) {
  const names = Object.keys(shares);
  const color = (index) => (index === names.length - 1 ? "#4a5568" : PALETTE[index % 5]);
  return h("div", {class: "bar", role: "img", "aria-label": names.map((name) => `${name} ${percent(shares[name])}`).join(", ")},
    names.map((name, index) => h("span", {style: `flex: ${shares[name]} 0 0; background: ${color(index)};${shares[name] ? "" : "padding:0"}`},
      shares[name] > 0.02 ? `${name} ${percent(shares[name])}` : "")));
}

async function unpack(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

// Charts. Plotly interprets some HTML in names, so they are escaped.

const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

const MANY = 6; // with more lines, a chart is wide and its legend is beside it

function plot(element, traces, x, y, legend) {
  const axis = (title) => ({title: {text: escaped(title), font: {size: 12}}, automargin: true, gridcolor: "#e2e8f0", zeroline: false});
  const layout = {
    margin: {l: 50, r: 16, t: 12, b: 44}, height: element.clientHeight, font: {size: 11, color: "#1a202c"},
    xaxis: axis(x), yaxis: axis(y), showlegend: legend, legend: traces.length > MANY ? {font: {size: 10}} : {orientation: "h", y: -0.25}, hovermode: "closest",
  };
  Plotly.newPlot(element, traces, layout, {responsive: true, displayModeBar: false});
}

// Plotly's text positions -> offset of the text from its point, in sizes of the text.
const PLACES = {"top right": [0, -1], "bottom right": [0, 0], "top left": [-1, -1], "bottom left": [-1, 0], "top center": [-0.5, -1],
  "bottom center": [-0.5, 0], "middle right": [0, -0.5], "middle left": [-1, -0.5]};

// Returns text and position for each point, so that the text covers no point and no other text. A text without such a
// position is left out. The texts of the points in `first` (booleans) are placed before all others.
function placeTexts(element, texts, first, x, y, xs, ys) {
  const pixels = (values, all, length) => values.map((value) => (value - Math.min(...all)) / (Math.max(...all) - Math.min(...all) || 1) * 0.9 * length);
  const plotWidth = element.clientWidth - 80, left = pixels(x, xs, plotWidth), top = pixels(y, ys, element.clientHeight - 70).map((value) => -value);
  const taken = x.map((_, i) => [left[i] - 5, top[i] - 5, left[i] + 5, top[i] + 5]);
  const place = (text, i) => {
    for (const [position, [right, down]] of Object.entries(text ? PLACES : {})) {
      const width = 5.8 * text.length, x0 = left[i] + right * width + 7 * (1 + 2 * right), y0 = top[i] + down * 13 + 6 * (1 + 2 * down);
      const box = [x0, y0, x0 + width, y0 + 13];
      if (x0 >= -0.04 * plotWidth && box[2] <= 0.94 * plotWidth && taken.every((other, j) => j === i || other[0] > box[2] || other[2] < box[0] || other[1] > box[3] || other[3] < box[1])) {
        taken.push(box);
        return [text, position];
      }
    }
    return ["", "top right"];
  };
  const placed = texts.map((text, i) => (first[i] ? place(text, i) : null));
  return placed.map((done, i) => done || place(texts[i], i));
}

const withFigure = (points, name) => points.filter((point) => (point.figures[name] ?? null) !== null);

function pointsChart(element, page, quality) {
  const points = withFigure(page.points, quality).sort((a, b) => a.ms - b.ms);
  const x = points.map((point) => point.ms), y = points.map((point) => point.figures[quality]);
  const xIntervals = points.map((point) => point.ms_interval), yIntervals = points.map((point) => point.figures[`${quality}_interval`]);
  const bars = (values, intervals) => ({type: "data", symmetric: false, thickness: 1, width: 2, color: "#cbd5e0",
    array: intervals.map((interval, i) => (interval ? Math.max(interval[1] - values[i], 0) : 0)),
    arrayminus: intervals.map((interval, i) => (interval ? Math.max(values[i] - interval[0], 0) : 0))});
  const symbols = {exit: "circle", routed: "diamond", chosen: "star", single_exit: "triangle-down", onnx: "triangle-up", rival: "triangle-up"};
  const crowded = points.length > 24 || points.some((point) => point.kind === "chosen");  // candidates have long names
  const hasText = (point) => !crowded || !["exit", "plain"].includes(point.kind) || point === page.points[0];
  const texts = points.map((point) => (hasText(point) ? point.name : ""));
  const recommended = (point) => page.verdict.startsWith(`Ship ${point.name}:`), main = (point) => ["routed", "chosen"].includes(point.kind);
  const placed = placeTexts(element, texts, points.map((point) => main(point) || recommended(point)), x, y,
    x.concat(...xIntervals.filter(Boolean)), y.concat(...yIntervals.filter(Boolean)));
  plot(element, [{
    x, y, mode: "markers+text", type: "scatter", error_x: bars(x, xIntervals), error_y: bars(y, yIntervals),
    text: placed.map(([text]) => escaped(text)), hovertext: points.map((point) => escaped(point.name)),
    hovertemplate: `%{hovertext}<br>%{x:.1f} ms, ${quality} %{y:.3f}<extra></extra>`, cliponaxis: false,
    textposition: placed.map(([_, position]) => position), textfont: {size: 10},
    marker: {size: points.map((point) => (main(point) ? 14 : 9) + (recommended(point) ? 5 : 0)), color: points.map((point) => page.colors[point.kind]),
      symbol: points.map((point) => (symbols[point.kind] || "square") + (point.other_runtime ? "-open" : ""))},
  }], page.x_title, quality, false);
}

function lineChart(chart) {
  const element = h("div", {class: "chart"});
  const draw = () => plot(element, chart.lines.map((line, i) => ({
    name: escaped(line.name), x: line.x, y: line.y, mode: line.bound || line.x.length > 60 ? "lines" : "lines+markers",
    connectgaps: true, line: {dash: line.bound ? "dash" : "solid", color: line.bound ? "#718096" : PALETTE[i % 6], width: 1.5}, marker: {size: 5},
  })), chart.x, chart.y, true);
  return [h("div", {class: chart.lines.length > MANY ? "wide" : null}, h("h3", {}, chart.title), element, chart.note ? h("p", {class: "note"}, chart.note) : null), draw];
}

// The threshold explorer. Its figures are equal to those of `choose` (earlyexit_ssd.calibration.thresholds),
// `photo_counts` and `ap_of_choice` (earlyexit_ssd.evaluation.matches), and are computed from the same matches.

class Explorer {
  constructor(photos, closed) {
    Object.assign(this, {photos, closed, early: photos.exits.length - 1, count: photos.files.length});
    this.confidences = photos.confidences.map((row) => Float32Array.from(row));
    this.classes = photos.matches.map((of_class) => {
      let pair = 0; // stored as differences
      return {...of_class, pairs: of_class.pairs.map((difference) => (pair += difference))};
    });
  }

  choose(thresholds) {
    const choice = new Int32Array(this.count).fill(this.early), limits = Float32Array.from(thresholds);
    for (let exit = this.early - 1; exit >= 0; exit--) {
      const row = this.confidences[exit];
      for (let i = 0; i < this.count; i++) if (row[i] >= limits[exit]) choice[i] = exit;
    }
    return choice;
  }

  ap50(choice) {
    if (!this.classes.length || !this.photos.labelled) return null;
    const exits = this.early + 1, chosen = new Uint8Array(this.count * exits);
    choice.forEach((exit, photo) => { chosen[photo * exits + exit] = 1; });
    let total = 0;
    for (const {objects, hits, rows, pairs, counts} of this.classes) {
      const precision = [], recall = [];
      for (let hit = 0, wrong = 0, right = 0, place = 0; hit < hits.length; hit++) {
        for (const end = place + rows[hit]; place < end; place++) if (chosen[pairs[place]]) wrong += counts[place];
        if (!chosen[hits[hit]]) continue;
        right++;
        precision.push(right / (wrong + right + Number.EPSILON));
        recall.push(right / objects);
      }
      for (let i = precision.length - 2; i >= 0; i--) precision[i] = Math.max(precision[i], precision[i + 1]);
      for (let step = 0, i = 0; step <= 100; step++) {
        while (i < recall.length && recall[i] < step * 0.01) i++;
        total += i < precision.length ? precision[i] : 0;
      }
    }
    return total / (101 * this.classes.length);
  }

  figures(thresholds) {
    const {photos, early, count} = this, choice = this.choose(thresholds), leaving = new Array(early + 1).fill(0);
    let found = 0, lost = 0, added = 0;
    choice.forEach((exit, i) => {
      leaving[exit] += 1;
      found += photos.hits[i][exit];
      lost += Math.max(0, photos.hits[i][early] - photos.hits[i][exit]);
      added += Math.max(0, photos.false[i][exit] - photos.false[i][early]);
    });
    const opened = thresholds.map((value) => value < this.closed).join();
    const costs = photos.costs.find((known) => known.opened.join() === opened) || {};
    const mean = (of_exits) => (of_exits ? leaving.reduce((sum, photoCount, exit) => sum + photoCount * of_exits[exit], 0) / count : null);
    return {choice, shares: leaving.map((photoCount) => photoCount / count), ap50: this.ap50(choice), found, lost, added, ms: mean(costs.ms), mmacs: mean(costs.mmacs)};
  }
}

function explorerSection(explorer, page, changed) {
  const {photos, early, count, closed} = explorer, names = photos.exits;
  const start = explorer.figures(photos.thresholds), full = explorer.figures(names.slice(0, -1).map(() => closed));
  const sorted = explorer.confidences.map((row) => Array.from(new Set(row)).filter((confidence) => confidence >= 0).sort((a, b) => b - a));
  const state = [...photos.thresholds], out = h("div", {"aria-live": "polite"}), sliders = [], boxes = [], closers = [];
  const commands = h("div", {});

  const show = () => {
    const now = explorer.figures(state), changes = now.choice.reduce((sum, exit, i) => sum + (exit !== start.choice[i]), 0);
    state.forEach((value, exit) => {
      closers[exit].checked = value >= closed;
      boxes[exit].value = value >= closed ? "" : shortest(value);
      const place = sorted[exit].findIndex((confidence) => confidence < Math.fround(value));
      sliders[exit].value = value >= closed ? 0 : place < 0 ? sorted[exit].length : place;
      sliders[exit].setAttribute("aria-valuetext", value >= closed ? "closed" : value.toPrecision(4));
    });
    const speed = now.ms && photos.plain.ms ? photos.plain.ms / now.ms : now.mmacs && photos.plain.mmacs ? photos.plain.mmacs / now.mmacs : null;
    const row = (name, key, get, text = number) => [name, get(now), get(start), get(full)].map((cell, i) =>
      i ? h("span", {"data-key": i === 1 ? key : null, "data-value": i === 1 ? cell : null}, text(cell)) : cell);
    const digits = (count) => (cell) => number(cell, count);
    out.replaceChildren(
      shareBar(Object.fromEntries(names.map((name, exit) => [name, now.shares[exit]]))),
      table([["", "now", "as evaluated", "all closed"],
        ...names.map((name, exit) => row(`photos leave at ${name}`, `share/${name}`, (figures) => figures.shares[exit], percent)),
        row("AP50", "ap50", (figures) => figures.ap50), row("objects found", "found", (figures) => figures.found, digits(0)),
        row("objects lost against the full path", "lost", (figures) => figures.lost, digits(0)), row("false positives added", "added", (figures) => figures.added, digits(0)),
        row("ms per photo", "ms", (figures) => figures.ms, digits(2)), row("MMAC per photo", "mmacs", (figures) => figures.mmacs, digits(1))]),
      h("p", {"data-key": "changed", "data-value": changes}, `${changes} of ${count} photos take another exit than as evaluated`
        + `${speed ? `; ${speed.toFixed(2)} times as fast as the detector without exits` : ""}. The photos below follow.`));
    const drop = now.ap50 === null ? null : Math.max(Math.ceil(1000 * (full.ap50 - now.ap50)) / 1000, 0.001);
    const targets = [...(speed ? [`--speedup ${speed.toFixed(2)}`] : []), ...(drop === null ? [] : [`--ap-drop ${drop}`])];
    commands.replaceChildren(...(page.command ? [h("h3", {}, "calibrate to this"), ...targets.map((target) => {
      const text = page.command.replace("{target}", target);
      const copy = (event) => { navigator.clipboard?.writeText(text); event.target.textContent = "copied"; };
      return h("pre", {}, text, " ", h("button", {type: "button", onclick: copy}, "copy"));
    })] : []));
    changed(now, start);
  };
  const set = (exit, value) => { if (value >= 0 && value <= 1 || value === closed) { state[exit] = value; show(); } };
  const setAll = (thresholds) => { Object.assign(state, thresholds); show(); };
  const rows = names.slice(0, -1).map((name, exit) => {
    const range = sliders[exit] = h("input", {type: "range", min: 0, max: sorted[exit].length, step: 1, "aria-label": `threshold of ${name}`,
      oninput: (event) => set(exit, +event.target.value ? sorted[exit][event.target.value - 1] : closed)});
    const box = boxes[exit] = h("input", {type: "number", min: 0, max: 1, step: "any", placeholder: "closed", "aria-label": `threshold of ${name}, number`,
      onchange: (event) => set(exit, event.target.value === "" ? closed : +event.target.value)});
    const closer = closers[exit] = h("input", {type: "checkbox", "aria-label": `close ${name}`,
      onchange: (event) => set(exit, event.target.checked ? closed : sorted[exit][sorted[exit].length >> 1] ?? 0)});
    return h("div", {class: "slider"}, h("span", {}, name), range, box, h("label", {}, closer, " closed"));
  });
  const curve = photos.curve.length > 1 ? h("label", {}, "a point along the curve, from slow to fast ",
    h("input", {type: "range", id: "curve", min: 0, max: photos.curve.length - 1, step: 1, value: 0,
      oninput: (event) => setAll(photos.curve[event.target.value].thresholds)})) : null;
  const reset = h("button", {type: "button", onclick: () => setAll(photos.thresholds)}, "as evaluated");
  const warning = photos.chosen_here ? "These are the calibration photos."
    : "These are test photos: do not choose thresholds on them. The commands below find thresholds on the calibration photos.";
  const section = h("section", {id: "explorer"}, h("h2", {}, "What if the thresholds were different?"),
    h("p", {class: "note"}, "A photo leaves at the first exit whose confidence reaches the threshold. At 0 every photo leaves. The further to the right, the more photos leave. ", warning,
      " Milliseconds are known only for the set of open exits that was timed, MMACs for all sets. Lost and added are summed over the photos: a gain on one photo does not cancel a loss on another."),
    h("div", {class: "screen"}, rows, curve, reset), out, h("div", {class: "screen"}, commands));
  return [section, show];
}

// The gallery.

function frame(photos, index, boxes, caption, taken, truth) {
  const [width, height] = photos.sizes[index], size = Math.max(width, height) / 20, thumbnail = photos.thumbnails[index];
  return h("figure", {}, h("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": caption, class: taken ? "taken" : null},
    thumbnail ? h("image", {href: `data:image/jpeg;base64,${thumbnail}`, width, height, preserveAspectRatio: "none"}) : null,
    boxes.map(([x1, y1, x2, y2, label, score, state]) => {
      const kind = truth ? (score ? "ignored" : "object") : ["wrong", "hit", "ignored"][state];
      return [h("rect", {class: kind, x: x1, y: y1, width: Math.max(x2 - x1, 0), height: Math.max(y2 - y1, 0)}),
        h("text", {x: Math.max(x1, 0) + 3, y: Math.max(y1, 0) + size, "font-size": size}, truth ? photos.classes[label] : `${photos.classes[label]} ${score}`)];
    })), h("figcaption", {}, caption));
}

function gallerySection(explorer) {
  const {photos, early: last, count} = explorer, PAGE = 12;
  const errors = photos.hits.map((hits, i) => hits.map((found, exit) => photos.objects[i] - found + photos.false[i][exit]));
  const gain = errors.map((row) => row[0] - row[last]);
  let now, start, shown = PAGE;
  const ambiguity = (i) => Math.min(...explorer.confidences.map((row, exit) => Math.abs(row[i] - photos.thresholds[exit])), 9);
  const lost = (i) => Math.max(0, photos.hits[i][last] - photos.hits[i][now.choice[i]]);
  const added = (i) => Math.max(0, photos.false[i][now.choice[i]] - photos.false[i][last]);
  const filters = {
    "all photos": () => true,
    "left early and right": (i) => now.choice[i] < last && !lost(i) && !added(i),
    "left early and wrong": (i) => now.choice[i] < last && (lost(i) || added(i)),
    "overthinking": (i) => Math.min(...errors[i]) < errors[i][last],
    "empty": (i) => !photos.objects[i],
    "another exit than as evaluated": (i) => now.choice[i] !== start.choice[i],
  };
  const orders = {
    "greatest gain first": (i) => -gain[i],
    "least gain first": (i) => gain[i],
    "most ambiguous first": ambiguity,
    "by exit": (i) => now.choice[i],
  };
  const select = (names, label) => h("select", {"aria-label": label, onchange: () => { shown = PAGE; draw(); }}, names.map((name) => h("option", {}, name)));
  const filter = select(Object.keys(filters), "which photos"), order = select([...Object.keys(orders), "by file name"], "order of the photos");
  const find = h("input", {type: "search", placeholder: "file name", "aria-label": "file name", oninput: () => { shown = PAGE; draw(); }});
  const list = h("div", {}), summary = h("p", {class: "note", "aria-live": "polite"});
  const more = h("button", {type: "button", onclick: () => { shown += PAGE; draw(); }}, "more photos");
  const draw = () => {
    const passes = filters[filter.value], key = orders[order.value], text = find.value.toLowerCase();
    const chosen = [...photos.files.keys()].filter((i) => passes(i) && photos.files[i].toLowerCase().includes(text));
    if (key) {
      const keys = Float64Array.from({length: count}, (_, i) => key(i));
      chosen.sort((a, b) => keys[a] - keys[b] || a - b);
    } else chosen.sort((a, b) => (photos.files[a] < photos.files[b] ? -1 : 1));
    const embedded = Object.keys(photos.thumbnails).length;
    summary.textContent = `${chosen.length} of ${count} photos${photos.folder ? ` in ${photos.folder}` : ""}. ` + (embedded < count ? `${embedded} have a thumbnail in this file; the others show only the boxes. ` : "")
      + `Solid green: found. Dashed red: false. Grey: ignored. Orange frame: the exit taken. Boxes of score ${photos.score} or more.`;
    list.replaceChildren(...chosen.slice(0, shown).map((i) => {
      const exit = now.choice[i], confidence = exit < last ? `, confidence ${number(explorer.confidences[exit][i])}` : "";
      const counts = (at) => `${photos.hits[i][at]} of ${photos.objects[i]} found, ${photos.false[i][at]} false`;
      return h("article", {class: "photo", "data-photo": i}, h("p", {}, h("b", {}, photos.files[i]), ` leaves at ${photos.exits[exit]}${confidence}; lost ${lost(i)}, added ${added(i)}; gain ${gain[i]}`),
        h("div", {class: "frames"}, frame(photos, i, photos.truth[i], photos.labelled ? "ground truth" : "full path, as the truth", false, true),
          photos.exits.map((name, at) => frame(photos, i, photos.found[i][at], `${name}: ${counts(at)}`, at === exit, false))));
    }));
    more.hidden = shown >= chosen.length;
  };
  const section = h("section", {id: "photos"}, h("h2", {}, "The photos"),
    h("p", {class: "note"}, "Right: nothing lost or added against the full path. Overthinking: an early exit makes fewer errors (missed or false) than the full path. "
      + "Gain: errors of the first exit minus errors of the full path. Ambiguous: a confidence near its threshold."), h("div", {class: "controls"}, filter, order, find), summary, list, more);
  return [section, (figures, evaluated) => { now = figures; start = evaluated; draw(); }];
}

// Which photos leave early.

const FEW = 5; // groups with fewer photos are pale and not compared

function benefitSection(explorer) {
  const {photos, early} = explorer, comparisons = h("ul", {}), charts = h("div", {class: "groups"});
  const draw = ({choice}) => {
    const lines = [];
    charts.replaceChildren(...photos.groups.filter((group) => group.bins.length).map((group) => {
      const bins = group.bins.map((bin) => {
        const left = bin.photos.filter((i) => choice[i] < early);
        return {label: bin.label, count: bin.photos.length, share: left.length / bin.photos.length};
      });
      const enough = bins.filter((bin) => bin.count >= FEW).sort((a, b) => b.share - a.share);
      if (enough.length > 1) {
        const [most, least] = [enough[0], enough[enough.length - 1]], even = most.share - least.share < 0.05;
        lines.push(`${group.title}: ` + (even ? `makes no difference (${percent(least.share)} to ${percent(most.share)} leave early).`
          : `${most.label} leaves early most often (${percent(most.share)}), ${least.label} least (${percent(least.share)}).`));
      }
      return h("div", {}, h("h3", {}, group.title), bins.map((bin) => h("div", {class: bin.count < FEW ? "meter few" : "meter"}, h("span", {}, bin.label),
        h("i", {style: `width: ${100 * bin.share}%`}), h("span", {}, `${percent(bin.share)} of ${bin.count}`))));
    }));
    comparisons.replaceChildren(...lines.map((line) => h("li", {}, line)));
  };
  const section = h("section", {id: "benefit"}, h("h2", {}, "Which photos leave early?"),
    h("p", {class: "note"}, `Share of the photos that leave before the full path, with the thresholds above. Pale: fewer than ${FEW} photos. Brightness is known for photos with a thumbnail.`), comparisons, charts);
  return [section, draw];
}

function attentionSection(photos) {
  const rows = new Map();
  for (const map of photos.attention) rows.set(map.photo, [...(rows.get(map.photo) || []), map]);
  return h("section", {id: "attention"}, h("h2", {}, "Where the exits look"),
    h("p", {class: "note"}, "Bright: what the exit's strongest detection depends on. Branches with channel attention show the attention-weighted activation, others gradient times activation."),
    Array.from(rows, ([photo, maps]) => h("div", {class: "photo"}, h("p", {}, photos.files[photo]), h("div", {class: "frames"},
      frame(photos, photo, photos.truth[photo], "ground truth", false, true),
      maps.map(({exit, method, picture}) => h("figure", {}, h("img", {src: `data:image/jpeg;base64,${picture}`, alt: `${exit}, ${method}`}), h("figcaption", {}, `${exit}: ${method}`)))))));
}

// The page.

function firstScreen(page) {
  const chart = h("div", {class: "chart"}), later = [];
  const quality = h("select", {"aria-label": "figure of the chart", onchange: (event) => pointsChart(chart, page, event.target.value)},
    ["AP50", "AP"].map((name) => h("option", {}, name)));
  const both = withFigure(page.points, "AP").length > 0;
  if (withFigure(page.points, "AP50").length) later.push(() => pointsChart(chart, page, "AP50"));
  const vetoes = page.findings.filter((finding) => finding.veto), others = page.findings.filter((finding) => !finding.veto);
  const list = (title, findings) => (findings.length ? [h("h3", {}, title), h("ul", {}, findings.map((finding) => h("li", {}, finding.line)))] : []);
  const tiles = page.tiles.map(({name, value, note, good}) => h("div", {class: `tile ${good === null ? "" : good ? "yes" : "no"}`}, name, h("b", {}, value), h("span", {}, note)));
  const shares = Object.keys(page.shares).length ? [h("h3", {}, "where the photos leave"), shareBar(page.shares)] : [];
  const element = h("section", {class: "first"}, h("div", {class: "tiles"}, tiles), shares,
    h("div", {class: later.length ? "columns" : ""},
      later.length ? h("div", {}, h("h3", {}, "accuracy against time: up and to the left is better ", both ? h("span", {class: "screen"}, quality) : null), chart,
        h("p", {class: "note"}, "Diamond or star: routed or chosen. Circles: exits. Squares: without exits. Triangles: rivals. Bars: 95 % intervals. Hollow: another runtime, not to be compared.")) : null,
      h("div", {}, list("why not", vetoes), list(vetoes.length ? "found besides" : "why", others))),
    page.table.length ? table(page.table) : null);
  return [element, later];
}

async function start() {
  const [code, text] = await Promise.all([unpack("plotly"), unpack("data")]), page = JSON.parse(text), main = document.getElementById("page");
  document.head.append(h("script", {}, code));
  if (page.good !== null) main.className = page.good ? "good" : "bad";
  const [first, later] = firstScreen(page), nav = h("nav", {"aria-label": "sections"});
  const links = Object.entries(page.links).map(([name, href]) => h("a", {href}, name));
  main.append(nav, first);
  if (page.photos) {
    const explorer = new Explorer(page.photos, page.closed);
    const [photos, drawPhotos] = gallerySection(explorer), [benefit, drawBenefit] = benefitSection(explorer);
    const [element, show] = explorerSection(explorer, page, (now, evaluated) => { drawPhotos(now, evaluated); drawBenefit(now); });
    main.append(...(explorer.early ? [element] : []), photos, ...(explorer.early ? [benefit] : []), ...(page.photos.attention.length ? [attentionSection(page.photos)] : []));
    show();
  }
  page.sections.forEach((section, index) => {
    const charts = section.charts.map(lineChart);
    later.push(...charts.map(([, draw]) => draw));
    main.append(h("section", {id: `section${index}`}, h("h2", {}, section.title), section.table.length ? table(section.table, "text") : null,
      h("div", {class: "charts"}, charts.map(([element]) => element)), section.text ? h("pre", {}, section.text) : null));
  });
  nav.append(...[...main.querySelectorAll("section[id]")].map((section) => h("a", {href: `#${section.id}`}, section.querySelector("h2").textContent)), ...links);
  later.forEach((draw) => draw());
  document.body.dataset.ready = "yes";
}

start().catch((error) => { document.getElementById("page").append(h("p", {class: "no"}, `This page cannot be shown: ${error}`)); throw error; });
