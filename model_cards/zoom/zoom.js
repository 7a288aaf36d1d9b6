// Every figure of the page: buttons, double click, Ctrl with the wheel, or two fingers enlarge it; then it can be dragged.
for (const frame of document.querySelectorAll(".frame")) {
  const svg = frame.querySelector("svg");
  const zoom = Panzoom(svg, { maxScale: 16, minScale: 1, panOnlyWhenZoomed: true, cursor: "default", touchAction: "pan-y" });
  svg.addEventListener("panzoomchange", ({ detail: { scale, x, y } }) => {
    svg.style.touchAction = scale > 1 ? "none" : "pan-y";
    svg.style.cursor = scale > 1 ? "move" : "default";
    if (scale === 1 && (x || y)) zoom.reset();
  });
  frame.addEventListener("wheel", (event) => event.ctrlKey && zoom.zoomWithWheel(event), { passive: false });
  frame.addEventListener("dblclick", (event) => zoom.zoomToPoint(zoom.getScale() * 2, event));
  const buttons = document.createElement("div");
  buttons.className = "zoom";
  for (const [sign, label, act] of [["+", "enlarge", zoom.zoomIn], ["−", "make smaller", zoom.zoomOut], ["↺", "show all", zoom.reset]]) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = sign;
    button.title = label;
    button.setAttribute("aria-label", label);
    button.addEventListener("click", () => act());
    buttons.append(button);
  }
  frame.after(buttons);
}
