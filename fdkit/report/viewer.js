// The attention viewer of a report. It reads the data block beside it and draws on canvases; it loads nothing.
//
// A sheet is a picture whose rows are queries (the class token first, if there is one) and whose columns are, head by
// head, the cells looked at; a pixel is 255 * sqrt(attention / the row's largest). See fdkit/analysis/attention_viewer.py.
"use strict";

(() => {
  // Of matplotlib's viridis, at equal steps: readable with any colour vision, and brighter means more.
  const COLOURS = [
    [68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141],
    [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37],
  ];
  const OVERLAY = 0.72; // how much of a pixel is attention, the rest is the picture in grey
  const SIDE = 448; // canvas pixels
  const WAIT = 400; // milliseconds without a move before the reading is spoken

  const root = document.getElementById("attention-viewer");
  const models = JSON.parse(document.getElementById("attention-data").textContent).models;
  const controls = {
    images: root.querySelector(".viewer-images"),
    layer: root.querySelector("[name=layer]"),
    layerText: root.querySelector(".viewer-layer"),
    head: root.querySelector("[name=head]"),
    classToken: root.querySelector("[name=class-token]"),
    spoken: root.querySelector(".viewer-spoken"),
  };
  const deepest = Math.max(...models.map((model) => model.layers.length));
  const mostHeads = Math.max(...models.flatMap((model) => model.layers.map((layer) => layer.num_heads)));
  const numImages = Math.min(...models.map((model) => model.sheets.length));
  // Which place is asked, from 0 to 1 from left and top, so that models with different patches are asked for the same.
  const state = { image: 0, layer: deepest - 1, head: -1, x: 0.5, y: 0.5, classToken: false };
  const sheets = new Map(); // decoded ones, by model, image and layer
  const panels = [...root.querySelectorAll(".viewer-model")].map((element, number) => ({
    element,
    model: models[number],
    number,
    canvas: element.querySelector("canvas"),
    reading: element.querySelector(".viewer-reading"),
    picture: null,
  }));

  /** The layer of a model that stands as deep as the chosen one in the deepest model. */
  function layerOf(model) {
    return deepest === 1 ? 0 : Math.round((state.layer * (model.layers.length - 1)) / (deepest - 1));
  }

  function decoded(source) {
    return new Promise((resolve, reject) => {
      const image = new Image();
      image.onload = () => resolve(image);
      image.onerror = () => reject(new Error("a picture of the attention viewer cannot be decoded"));
      image.src = source;
    });
  }

  /** One layer's rows for one image: {width, pixels}, the red channel being the value; kept once decoded. */
  function sheet(panel, layer) {
    const key = `${panel.number}/${state.image}/${layer}`;
    if (!sheets.has(key)) {
      const source = `data:image/webp;base64,${panel.model.sheets[state.image][layer]}`;
      sheets.set(key, decoded(source).then((image) => {
        const canvas = document.createElement("canvas");
        canvas.width = image.naturalWidth;
        canvas.height = image.naturalHeight;
        const context = canvas.getContext("2d", { willReadFrequently: true });
        context.drawImage(image, 0, 0);
        const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
        const values = new Uint8Array(canvas.width * canvas.height);
        for (let place = 0; place < values.length; place += 1) values[place] = pixels[4 * place];
        return { width: canvas.width, height: canvas.height, values };
      }));
    }
    return sheets.get(key);
  }

  /** The cell asked, or -1 for the class token. */
  function queryOf(model, grid) {
    if (state.classToken && model.has_class_token) return -1;
    const row = Math.min(grid[0] - 1, Math.floor(state.y * grid[0]));
    const column = Math.min(grid[1] - 1, Math.floor(state.x * grid[1]));
    return row * grid[1] + column;
  }

  /** Attention of the query to each cell, of the chosen head or the mean of all, and to tokens without a place. */
  function attentionOf(model, layer, rows, query) {
    const { grid, num_heads: numHeads } = model.layers[layer];
    const numCells = grid[0] * grid[1];
    const row = query + (model.has_class_token ? 1 : 0);
    const lost = Uint8Array.from(atob(model.elsewhere[state.image][layer]), (letter) => letter.charCodeAt(0));
    const heads = state.head < 0 ? [...Array(numHeads).keys()] : [Math.min(state.head, numHeads - 1)];
    const cells = new Float64Array(numCells);
    let elsewhere = 0;
    for (const head of heads) {
      const start = row * rows.width + head * numCells;
      let sum = 0;
      for (let cell = 0; cell < numCells; cell += 1) sum += rows.values[start + cell] ** 2;
      const away = lost[head * rows.height + row] / 255;
      for (let cell = 0; cell < numCells; cell += 1) {
        if (sum > 0) cells[cell] += ((rows.values[start + cell] ** 2 / sum) * (1 - away)) / heads.length;
      }
      elsewhere += away / heads.length;
    }
    return { cells, elsewhere };
  }

  function colour(value) {
    const place = Math.min(1, Math.max(0, value)) * (COLOURS.length - 1);
    const low = Math.min(COLOURS.length - 2, Math.floor(place));
    return COLOURS[low].map((from, channel) => from + (place - low) * (COLOURS[low + 1][channel] - from));
  }

  function paint(panel, grid, cells, query) {
    const canvas = panel.canvas;
    const context = canvas.getContext("2d");
    const largest = Math.max(...cells, 1e-9);
    const map = document.createElement("canvas");
    map.width = grid[1];
    map.height = grid[0];
    const pixels = map.getContext("2d").createImageData(grid[1], grid[0]);
    cells.forEach((share, cell) => pixels.data.set([...colour(share / largest), 255], 4 * cell));
    map.getContext("2d").putImageData(pixels, 0, 0);
    context.globalAlpha = 1;
    context.filter = "grayscale(1)";
    context.imageSmoothingEnabled = panel.picture.naturalWidth > 64;
    context.drawImage(panel.picture, 0, 0, canvas.width, canvas.height);
    context.filter = "none";
    context.globalAlpha = OVERLAY;
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(map, 0, 0, canvas.width, canvas.height);
    context.globalAlpha = 1;
    if (query < 0) return;
    const width = canvas.width / grid[1];
    const height = canvas.height / grid[0];
    const left = (query % grid[1]) * width;
    const top = Math.floor(query / grid[1]) * height;
    context.lineWidth = 6;
    context.strokeStyle = "#000";
    context.strokeRect(left, top, width, height);
    context.lineWidth = 3;
    context.strokeStyle = "#fff";
    context.strokeRect(left, top, width, height);
  }

  const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

  /** In words: how far, how much on the brightest place, how much on tokens without a place. */
  function reading(panel, layer, grid, cells, elsewhere, query) {
    const { model } = panel;
    const numHeads = model.layers[layer].num_heads;
    const head = state.head < 0 ? `mean of ${numHeads} heads` : `head ${Math.min(state.head, numHeads - 1) + 1} of ${numHeads}`;
    const parts = [`layer ${layer + 1} of ${model.layers.length}, ${head}`];
    const seen = cells.reduce((sum, share) => sum + share, 0);
    if (query >= 0 && seen > 0) {
      const stride = model.image_size / grid[1];
      let distance = 0;
      cells.forEach((share, cell) => {
        const rows = Math.floor(cell / grid[1]) - Math.floor(query / grid[1]);
        distance += (share * Math.hypot(rows, (cell % grid[1]) - (query % grid[1]))) / seen;
      });
      parts.push(`looks ${Math.round(distance * stride)} px away`);
    }
    parts.push(`brightest place ${percent(Math.max(...cells))}`);
    if (elsewhere > 0.002) parts.push(`${percent(elsewhere)} on tokens outside the image`);
    return parts.join(" · ");
  }

  let drawing = 0;
  let speaking = 0;

  async function draw() {
    drawing += 1;
    const turn = drawing;
    controls.layerText.textContent = `${state.layer + 1} of ${deepest}`;
    for (const panel of panels) {
      const layer = layerOf(panel.model);
      const [rows, picture] = await Promise.all([
        sheet(panel, layer),
        decoded(`data:image/jpeg;base64,${panel.model.pictures[state.image]}`),
      ]);
      if (turn !== drawing) return; // somebody has moved on meanwhile
      panel.picture = picture;
      const { grid } = panel.model.layers[layer];
      const query = queryOf(panel.model, grid);
      const { cells, elsewhere } = attentionOf(panel.model, layer, rows, query);
      paint(panel, grid, cells, query);
      panel.reading.textContent = reading(panel, layer, grid, cells, elsewhere, query);
    }
    clearTimeout(speaking);
    speaking = setTimeout(() => {
      controls.spoken.textContent = panels
        .map((panel) => `${panel.element.dataset.name}: ${panel.reading.textContent}`)
        .join(". ");
    }, WAIT);
  }

  function ask(x, y) {
    state.x = Math.min(0.9999, Math.max(0, x));
    state.y = Math.min(0.9999, Math.max(0, y));
    state.classToken = false;
    controls.classToken.checked = false;
    draw();
  }

  function step(panel, columns, rows) {
    const { grid } = panel.model.layers[layerOf(panel.model)];
    const column = Math.floor(state.x * grid[1]) + columns;
    const row = Math.floor(state.y * grid[0]) + rows;
    ask((column + 0.5) / grid[1], (row + 0.5) / grid[0]);
  }

  function changeLayer(by) {
    state.layer = Math.min(deepest - 1, Math.max(0, state.layer + by));
    controls.layer.value = String(state.layer + 1);
    draw();
  }

  const KEYS = {
    ArrowLeft: (panel) => step(panel, -1, 0),
    ArrowRight: (panel) => step(panel, 1, 0),
    ArrowUp: (panel) => step(panel, 0, -1),
    ArrowDown: (panel) => step(panel, 0, 1),
    "+": () => changeLayer(1),
    "-": () => changeLayer(-1),
  };

  for (const panel of panels) {
    panel.canvas.width = SIDE;
    panel.canvas.height = SIDE;
    const point = (event) => {
      const box = panel.canvas.getBoundingClientRect();
      ask((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    };
    panel.canvas.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse") point(event);
    });
    panel.canvas.addEventListener("click", point);
    panel.canvas.addEventListener("keydown", (event) => {
      if (!(event.key in KEYS) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      KEYS[event.key](panel);
    });
  }

  for (let number = 0; number < numImages; number += 1) {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", String(number === 0));
    const image = document.createElement("img");
    image.src = `data:image/jpeg;base64,${models[0].pictures[number]}`;
    image.alt = `image ${number + 1}: ${models[0].image_names[number]}`;
    if (models[0].image_size <= 64) image.className = "pixelated";
    button.append(image);
    button.title = models[0].image_names[number];
    button.addEventListener("click", () => {
      state.image = number;
      [...controls.images.children].forEach((one, place) => one.setAttribute("aria-pressed", String(place === number)));
      draw();
    });
    controls.images.append(button);
  }

  controls.layer.max = String(deepest);
  controls.layer.value = String(deepest);
  controls.layer.addEventListener("input", () => {
    state.layer = Number(controls.layer.value) - 1;
    draw();
  });
  controls.head.append(new Option("mean of all", "-1"));
  for (let head = 0; head < mostHeads; head += 1) controls.head.append(new Option(String(head + 1), String(head)));
  controls.head.addEventListener("change", () => {
    state.head = Number(controls.head.value);
    draw();
  });
  if (models.some((model) => model.has_class_token)) {
    controls.classToken.addEventListener("change", () => {
      state.classToken = controls.classToken.checked;
      draw();
    });
  } else {
    controls.classToken.closest("label").remove();
  }
  root.hidden = false;
  for (const still of document.querySelectorAll(".viewer-still")) still.hidden = true;
  draw();
})();
