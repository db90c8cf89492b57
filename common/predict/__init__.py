"""10: trained networks give answers for new images, without labels, folds or a work folder of their own."""
