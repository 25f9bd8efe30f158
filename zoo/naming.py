"""What metrics are called, in order, wherever they are shown: tables, cards, pages and the command line."""

METRICS = {
    "image_auroc": "image ROC",
    "image_f1_max": "image F1",
    "image_ap": "image PR",
    "pixel_auroc": "pixel ROC",
    "pixel_f1_max": "pixel F1",
    "pixel_ap": "pixel PR",
    "pixel_aupro": "PRO",
}
FURTHER = {  # under names of their own: see `zoo.protocol`
    "image_f1_at_val": "image F1 at val threshold",
    "pixel_f1_at_val": "pixel F1 at val threshold",
    "pixel_pro_dfr200": "PRO dfr200",
}
