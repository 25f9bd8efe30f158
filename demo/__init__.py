"""The demo: a page that inspects SEM images; the wheel ships it as zoo.demo."""
