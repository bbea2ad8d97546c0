"""HALO: transfer, align, select, distill, finetune, fit the scaling; `pipeline` holds their order."""
