// What was just chosen comes into sight where it stands below what it was chosen from.
watch("value", () => {
  const top = element.getBoundingClientRect().top;
  if (top < innerHeight * 0.75 && top >= 0) return;
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  element.scrollIntoView({ block: "start", behavior: calm ? "auto" : "smooth" });
});
