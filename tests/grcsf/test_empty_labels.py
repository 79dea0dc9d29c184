"""One training case without any label: it is trained on, and the picture of the training shows another case."""

from test_grcsf_trainer import labelled_patch, make_with_cases, training_cases


def test_one_case_without_labels_is_trained_on_and_the_picture_shows_another(nnunet_folders, monkeypatch):
    cases = training_cases(nnunet_folders)
    trainer = make_with_cases(nnunet_folders, cases)
    load = trainer.dataset_class.load_case

    def first_without_labels(self, case):
        data, seg, previous, properties = load(self, case)
        if case == self.identifiers[0]:
            properties = {**properties, "class_locations": {key: [] for key in properties["class_locations"]}}
        return data, seg, previous, properties

    monkeypatch.setattr(trainer.dataset_class, "load_case", first_without_labels)
    training, validation = trainer.get_tr_and_val_datasets()
    assert list(training.identifiers) == list(cases)
    assert labelled_patch(validation, trainer.configuration_manager.patch_size).case == validation.identifiers[1]
