"""The paper half: tables as data, plans, estimates, results, figures. It never imports torch."""
