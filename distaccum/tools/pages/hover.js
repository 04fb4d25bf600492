// Shows the values under the pointer. The page says the same without it.
for (const svg of document.querySelectorAll("svg[data-x]")) {
  const axis = (text) => { const [from, to, low, high, isLog] = text.split(",").map(Number); return { from, to, low, high, isLog }; };
  const x = axis(svg.dataset.x), y = axis(svg.dataset.y);
  const value = (a, at) => {
    const share = (at - a.from) / (a.to - a.from);
    return a.isLog ? a.low * (a.high / a.low) ** share : a.low + share * (a.high - a.low);
  };
  const shown = (number) => Math.abs(number) >= 1000 ? Math.round(number).toLocaleString("en") : String(+number.toPrecision(3));
  const tip = document.createElement("div");
  tip.className = "tip"; tip.hidden = true;
  svg.parentNode.style.position = "relative"; svg.after(tip);
  const rule = svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "line"));
  rule.setAttribute("class", "rule"); rule.setAttribute("y1", y.from); rule.setAttribute("y2", y.to);
  const curves = [...svg.querySelectorAll(".curve[data-name]")].map((group) => ({
    name: group.dataset.name,
    style: group.getAttribute("class"),
    points: [...group.querySelectorAll("polyline")].flatMap((line) => [...line.points]).concat(
      group.querySelector("polyline") ? [] : [...group.querySelectorAll("circle")].map((dot) => ({ x: +dot.getAttribute("cx"), y: +dot.getAttribute("cy") }))),
  })).filter((curve) => curve.points.length);
  const hide = () => { tip.hidden = true; rule.style.display = "none"; };
  hide();
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    if (!curves.length || at.x < x.from - 6 || at.x > x.to + 6) return hide();
    const near = curves.map((curve) => ({ ...curve, point: curve.points.reduce((a, b) => Math.abs(b.x - at.x) < Math.abs(a.x - at.x) ? b : a) }));
    const middle = near.reduce((a, b) => Math.abs(b.point.x - at.x) < Math.abs(a.point.x - at.x) ? b : a).point.x;
    rule.setAttribute("x1", middle); rule.setAttribute("x2", middle); rule.style.display = "";
    tip.replaceChildren(document.createTextNode(svg.dataset.at + " " + shown(value(x, middle))));
    for (const curve of near.filter((one) => Math.abs(one.point.x - middle) < 12)) {
      const row = tip.appendChild(document.createElement("div"));
      row.className = curve.style.replace("curve", ""); row.textContent = curve.name + " " + shown(value(y, curve.point.y));
    }
    tip.hidden = false;
    const box = svg.getBoundingClientRect(), left = event.clientX - box.left + svg.offsetLeft;
    tip.style.left = Math.min(left + 14, box.width - tip.offsetWidth) + "px"; tip.style.top = "26px";
  });
}
