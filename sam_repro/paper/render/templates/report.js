document.querySelectorAll('table').forEach(table => table.querySelectorAll('th').forEach((th, column) => {
  th.classList.add('sortable'); th.title = 'sort';
  th.onclick = () => {
    const body = table.tBodies[0], up = th.dataset.up = th.dataset.up === '1' ? '' : '1';
    const value = row => { const t = row.cells[column].textContent, n = parseFloat(t); return isNaN(n) ? t : n; };
    const order = (a, b) => { const x = value(a), y = value(b);
      return typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === 'number' ? -1 : 1; };
    [...body.rows].sort((a, b) => up ? order(a, b) : order(b, a)).forEach(row => body.append(row));
  };
}));
const filter = document.getElementById('filter');
filter.oninput = () => {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  document.querySelectorAll('.filterable').forEach(item => {
    const text = (item.dataset.words || item.textContent).toLowerCase();
    item.hidden = !words.every(w => text.includes(w));
  });
  // A row answers to the words of its table's title too, but not where some row's id has the word as a part: gsam
  document.querySelectorAll('.filterable').forEach(item => {
    const rows = [...item.querySelectorAll('tbody tr')], title = (item.dataset.title || '').toLowerCase();
    const named = new Set(rows.flatMap(row => row.dataset.words.toLowerCase().split('/')));
    rows.forEach(row => {
      const text = (row.dataset.words + ' ' + row.textContent).toLowerCase();
      row.hidden = !words.every(w => text.includes(w) || title.includes(w) && !named.has(w));
    });
  });
  document.querySelectorAll('[data-holds]').forEach(fold => {  // what folds others opens while something is looked for
    fold.hidden = words.length && !fold.querySelector('.filterable:not([hidden])'); fold.open = words.length > 0;
  });
  document.querySelectorAll('[data-of]').forEach(row => {
    row.hidden = document.getElementById(row.dataset.of).hidden;
  });
};
addEventListener('hashchange', reveal); reveal();
function reveal() {
  const at = document.getElementById(location.hash.slice(1));
  for (let fold = at; fold; fold = fold.parentElement) if (fold.tagName === 'DETAILS') fold.open = true;
  if (at) at.scrollIntoView();
}
